// The tiles and the table: GET v1/live once a second while the page is seen.

import { call } from "./api.js";
import { count, duration, element, median, percent, rate, usd } from "./format.js";

const SECOND = 1000;
const KEPT = 60; // points of a line
const RECENT = 10; // requests whose median time to first token is shown
const BASES = {
  direct: "direct: the device seconds of these tokens alone",
  busy: "busy: with the waste that came with them",
  wall: "wall: with idle time and start-up; adds up to the bill",
};

const by = (id) => document.getElementById(id);
const text = (id, value) => {
  if (by(id).textContent !== value) by(id).textContent = value;
};
const samples = []; // of the last seconds: {time, generated, prompt, joules}
const lines = { speed: [], ttft: [], queue: [] };
let last = null;
let failures = 0;
let shownRequests = "";

export function setUpLive() {
  const basis = by("basis");
  basis.value = localStorage.getItem("fen.basis") in BASES ? localStorage.getItem("fen.basis") : "busy";
  basis.addEventListener("change", () => {
    localStorage.setItem("fen.basis", basis.value);
    if (last) showPrices(last.cost);
  });
  let timer = 0;
  const tick = async () => {
    clearTimeout(timer);
    if (document.hidden) return;
    await poll();
    clearTimeout(timer);
    timer = setTimeout(tick, SECOND * Math.min(1 + failures, 5));
  };
  document.addEventListener("visibilitychange", () => {
    samples.length = 0;
    tick();
  });
  tick();
}

async function poll() {
  try {
    const response = await call("v1/live");
    last = await response.json();
  } catch (error) {
    failures++;
    samples.length = 0;
    state("away", error.status === 401 ? "no key" : error.status ? error.message : "the server does not answer");
    return;
  }
  failures = 0;
  state(last.ready ? "ready" : "waiting", last.ready ? "ready" : last.reason);
  show(last);
}

function state(kind, words) {
  by("state").dataset.state = kind;
  text("state-text", words);
}

function show(live) {
  const cost = live.cost;
  text("model", [live.model, cost?.quantization, cost?.device].filter(Boolean).join(" · "));
  document.title = `${live.model} – Fen`;
  showSpeed(live);

  const times = live.requests.map((request) => request.time_to_first_token_ms).filter((ms) => ms !== null);
  const recent = times.slice(0, RECENT);
  text("ttft", duration(median(recent)));
  text("ttft-note", recent.length > 1 ? `median of ${recent.length}` : recent.length ? "of one request" : "no request yet");
  line("ttft", times.slice(0, KEPT).reverse());

  const { running, waiting } = live.load;
  text("running", count(running));
  text("waiting", waiting ? `and ${count(waiting)} wait` : "run; none wait");
  push("queue", running + waiting);

  text("kv", percent(live.load.kv_cache_usage));
  text("kv-note", `${count(live.load.kv_blocks_used)} of ${count(live.load.kv_blocks_total)} blocks`);
  by("kv-meter").value = live.load.kv_cache_usage;
  text("use", percent(cost?.utilisation));
  by("use-meter").value = cost?.utilisation || 0;
  showPrices(cost);
  showRequests(live.requests);
}

function showSpeed(live) {
  const joules = live.cost?.energy.joules ?? null;
  const now = { time: live.time, generated: live.tokens.generation, prompt: live.tokens.prompt, joules };
  const before = samples[0];
  if (before && (now.generated < before.generated || now.time <= before.time)) samples.length = 0; // a new server
  samples.push(now);
  while (samples.length > 4) samples.shift();
  if (samples.length < 2) return;
  const seconds = now.time - samples[0].time;
  const speed = (now.generated - samples[0].generated) / seconds;
  const reading = (now.prompt - samples[0].prompt) / seconds;
  text("speed", rate(speed));
  text("speed-note", reading ? `out, and ${rate(reading)} in` : "out, of all requests");
  push("speed", speed);
  const watts = joules === null || samples[0].joules === null ? null : (joules - samples[0].joules) / seconds;
  text("watts", watts === null ? "–" : `${rate(watts)} W`);
  text("watts-note", watts === null ? live.cost?.energy.reason || "not known" : "by the device's counter");
}

function showPrices(cost) {
  const basis = by("basis").value;
  const row = cost?.usd_per_million_tokens?.[basis];
  text("usd-prompt", usd(row?.prompt));
  text("usd-cached", usd(row?.cached_prompt));
  text("usd-decode", usd(row?.decode));
  text("usd-blend", usd(row?.blended_3_to_1));
  text("basis-note", BASES[basis]);
  const price = cost?.price;
  const notes = cost?.notes.length ? `; ${cost.notes.join("; ")}` : "";
  const origin = price && [price.name, price.date, price.source].filter(Boolean).join(", ");
  text("price-note", price
    ? `${cost.model} ${cost.quantization ?? ""} on ${cost.device}, at US$${price.usd_per_device_hour} a device-hour (${origin})${notes}`
    : cost?.reason || "");
}

const ENDS = { stop: "done", length: "length", abort: "stopped", error: "error", tool_calls: "tools" };

function showRequests(requests) {
  const newest = requests.map((request) => request.id).join();
  if (newest === shownRequests) return;
  shownRequests = newest;
  if (!requests.length) return;
  by("requests").replaceChildren(...requests.map((request) => {
    const ended = new Date((request.created + request.seconds) * 1000);
    const cells = [
      ended.toLocaleTimeString("en-GB"), count(request.prompt_tokens) + (request.cached_tokens ? ` (${count(request.cached_tokens)})` : ""), count(request.completion_tokens),
      duration(request.time_to_first_token_ms), rate(request.tokens_per_second), duration(request.seconds * 1000), usd(request.cost),
    ];
    const row = element("tr", { title: request.id }, ...cells.map((cell) => element("td", {}, cell)));
    row.append(element("td", {}, element("span", { class: `end ${request.finish_reason}` }, ENDS[request.finish_reason] || request.finish_reason)));
    return row;
  }));
}

function push(name, value) {
  lines[name].push(value);
  if (lines[name].length > KEPT) lines[name].shift();
  line(name, lines[name]);
}

// A curve from the left edge to the right, 0 at the bottom.
function line(name, values) {
  const [area, stroke] = by(`${name}-line`).children;
  if (values.length < 2) return;
  const top = Math.max(...values, 1e-9);
  const points = values.map((value, i) => `${((60 * i) / (values.length - 1)).toFixed(2)} ${(17 - (16 * value) / top).toFixed(2)}`);
  stroke.setAttribute("d", "M" + points.join("L"));
  area.setAttribute("d", `M0 18L${points.join("L")}L60 18Z`);
}
