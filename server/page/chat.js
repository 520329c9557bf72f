// The conversation: kept in this tab (a reload keeps it), sent whole with every message.

import { streamChat } from "./api.js";
import { count, duration, element, rate, usd } from "./format.js";
import { markdown } from "./markdown.js";
import { sampling } from "./settings.js";

const CHAT = "fen.chat";
const by = (id) => document.getElementById(id);
const [scroller, list, input, send, stop] = ["scroller", "messages", "input", "send", "stop"].map(by);
let turns = []; // {role, content, usage?, metrics?, finish?, error?}
let running = null; // AbortController of the answer that is coming
let leaving = false; // the browser ends what is under way, which is no error of the server

export function setUpChat() {
  try {
    turns = JSON.parse(sessionStorage.getItem(CHAT)) || [];
  } catch {
    turns = [];
  }
  render();
  by("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
  });
  stop.addEventListener("click", () => running?.abort());
  by("new-chat").addEventListener("click", () => {
    running?.abort();
    turns = [];
    save();
    render();
    input.focus();
  });
  for (const button of by("suggestions").querySelectorAll("button")) {
    button.addEventListener("click", () => ask(button.textContent));
  }
  addEventListener("pagehide", () => {
    leaving = true;
    save();
  });
  addEventListener("pageshow", () => (leaving = false));
}

function save() {
  try {
    sessionStorage.setItem(CHAT, JSON.stringify(turns));
  } catch {
    // more than the browser keeps: this conversation will not survive a reload
  }
}

function submit() {
  const question = input.value.trim();
  if (!question || running) return;
  input.value = "";
  grow();
  ask(question);
}

function ask(question) {
  if (running) return;
  turns.push({ role: "user", content: question });
  answer();
}

// An exchange that failed before the first word is left out of what the model sees.
function history() {
  const messages = [];
  for (const { role, content } of turns) {
    if (role === "assistant" && !content) messages.pop();
    else messages.push({ role, content });
  }
  return messages;
}

async function answer() {
  const { system, body } = sampling();
  const messages = history();
  if (system) messages.unshift({ role: "system", content: system });
  const turn = { role: "assistant", content: "" };
  turns.push(turn);
  running = new AbortController();
  render();
  scroller.scrollTop = scroller.scrollHeight;
  busy(true);
  const item = list.lastElementChild;
  let frame = 0;
  const draw = () => {
    frame = 0;
    const following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
    show(item, turn);
    if (following) scroller.scrollTop = scroller.scrollHeight;
  };
  const begun = performance.now();
  const mine = running;
  try {
    const events = streamChat({ ...body, messages, stream: true, stream_options: { include_usage: true } }, mine.signal);
    for await (const event of events) {
      const choice = event.choices[0];
      if (choice?.delta.content) turn.content += choice.delta.content;
      if (choice?.finish_reason) turn.finish = choice.finish_reason;
      if (event.usage) Object.assign(turn, { usage: event.usage, metrics: event.metrics });
      frame ||= requestAnimationFrame(draw);
    }
    if (turn.finish === "abort") turn.error = "The server ended this answer early.";
  } catch (error) {
    if (leaving) return;
    if (error.name === "AbortError") turn.finish = "stopped";
    else turn.error = error.message + (error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "");
  }
  turn.milliseconds = performance.now() - begun;
  cancelAnimationFrame(frame);
  if (running === mine) running = null;
  save();
  if (!turns.includes(turn)) return; // a new chat has begun meanwhile
  busy(false);
  render();
  scroller.scrollTop = scroller.scrollHeight;
  by("announce").textContent = turn.error || (turn.finish === "stopped" ? "Stopped." : "Answer: " + turn.content);
}

function busy(now) {
  const held = document.activeElement === (now ? send : stop);
  send.hidden = now;
  stop.hidden = !now;
  if (now) by("announce").textContent = "The answer is coming.";
  if (held) (now ? stop : input).focus();
}

function render() {
  by("welcome").hidden = turns.length > 0;
  list.replaceChildren(...turns.map((turn, i) => {
    const item = element("li", { class: turn.role }, element("h3", { class: "unseen" }, turn.role === "user" ? "You" : "Fen"), element("div", { class: "body" }));
    show(item, turn);
    if (turn.role === "assistant" && !(running && i === turns.length - 1)) item.append(footer(turn, i === turns.length - 1));
    return item;
  }));
  if (!running) busy(false);
}

function show(item, turn) {
  const body = item.querySelector(".body");
  if (turn.role === "user") {
    body.textContent = turn.content;
    return;
  }
  body.replaceChildren(markdown(turn.content));
  const coming = running && turn === turns.at(-1);
  item.classList.toggle("coming", Boolean(coming));
  if (coming && !turn.content) body.append(element("p", { class: "dots", "aria-label": "The answer is coming" }, "…"));
  if (turn.error) body.append(element("p", { class: "failed", role: "alert" }, turn.error));
}

function footer(turn, isLast) {
  const made = element("div", { class: "foot" });
  if (turn.usage) made.append(costs(turn));
  else if (turn.finish === "stopped") made.append(element("span", {}, "stopped; what was computed counts as aborted"));
  else if (!turn.error) made.append(element("span", {}, "interrupted"));
  if (turn.finish === "length") made.append(element("span", {}, "cut off at the token limit"));
  const actions = element("span", { class: "actions" });
  if (turn.content) {
    const copy = element("button", { type: "button" }, "Copy");
    copy.addEventListener("click", async () => {
      const done = await navigator.clipboard?.writeText(turn.content).then(() => true, () => false);
      copy.textContent = done ? "Copied" : "Not allowed here";
    });
    actions.append(copy);
  }
  if (isLast) {
    const again = element("button", { type: "button" }, "Try again");
    again.addEventListener("click", () => {
      if (running) return;
      turns.pop();
      answer();
      input.focus();
    });
    actions.append(again);
  }
  made.append(actions);
  return made;
}

// One line, and behind it where the money went.
function costs({ usage, metrics = {} }) {
  const details = usage.cost_details || {};
  const cached = usage.prompt_tokens_details?.cached_tokens || 0;
  const price = usage.cost === null || usage.cost === undefined ? [] : [element("b", {}, `US$${usd(usage.cost)}`), " · "];
  const facts = [`${count(usage.completion_tokens)} tokens`, `${rate(metrics.tokens_per_second)}/s`, `first in ${duration(metrics.time_to_first_token_ms)}`];
  const rows = [
    ["input", usage.prompt_tokens - cached, details.device_seconds?.prompt, details.input_usd],
    ["cached input", cached, details.device_seconds?.cached_prompt, details.cached_usd],
    ["output", usage.completion_tokens, details.device_seconds?.decode, details.output_usd],
  ].map(([name, tokens, seconds, dollars]) => element("tr", {}, element("th", { scope: "row" }, name),
    ...[count(tokens), seconds === undefined ? "–" : duration(1000 * seconds), usd(dollars)].map((cell) => element("td", {}, cell))));
  const head = element("tr", {}, ...["", "tokens", "device time", "US$"].map((name) => (name ? element("th", { scope: "col" }, name) : element("td"))));
  const given = details.price;
  const origin = given && [given.name, given.date, given.source].filter(Boolean).join(", ");
  return element("details", {}, element("summary", {}, ...price, facts.join(" · ")),
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)),
    element("p", {}, given ? `${details.basis} basis, at US$${given.usd_per_device_hour} a device-hour (${origin})` : details.reason || ""));
}

function grow() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight + 2, 220)}px`;
}
