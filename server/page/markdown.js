// The Markdown that models write, as elements. Text only ever becomes text nodes, so nothing in it can run.

import { element } from "./format.js";

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(\S(?:[\s\S]*?\S)?)\*\*|__(\S(?:[\s\S]*?\S)?)__|\*([^\s*](?:[^*]*[^\s*])?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/;

function inline(parent, text) {
  for (let match; (match = INLINE.exec(text)); text = text.slice(match.index + match[0].length)) {
    parent.append(text.slice(0, match.index));
    const [, ticks, code, strong, strong2, emphasis, label, address] = match;
    if (ticks) parent.append(element("code", {}, code.trim()));
    else if (address) parent.append(element("a", { href: address, rel: "noreferrer noopener", target: "_blank" }, label));
    else inline(parent.appendChild(element(emphasis ? "em" : "strong")), strong || strong2 || emphasis);
  }
  parent.append(text);
  return parent;
}

const FENCE = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*)/;
const ITEM = /^(\s*)(?:[-*+•]|(\d{1,9})[.)])\s+(.*)/;
const QUOTE = /^\s{0,3}>\s?(.*)/;

// `text` may be cut off anywhere: it is rendered while it grows.
export function markdown(text) {
  const made = document.createDocumentFragment();
  const lines = text.split("\n");
  let at = 0;
  const block = (line) => FENCE.test(line) || HEADING.test(line) || ITEM.test(line) || QUOTE.test(line);

  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at++;
    } else if ((match = FENCE.exec(line))) {
      const code = [];
      for (at++; at < lines.length && !lines[at].trim().startsWith(match[1]); at++) code.push(lines[at]);
      at++;
      const attributes = { tabindex: "0", role: "region", "aria-label": match[2] ? `code, ${match[2]}` : "code" };
      made.append(element("pre", attributes, element("code", {}, code.join("\n"))));
    } else if ((match = HEADING.exec(line))) {
      made.append(inline(element("p", { class: "heading" }), match[2]));
      at++;
    } else if (QUOTE.test(line)) {
      const inner = [];
      for (; at < lines.length && (match = QUOTE.exec(lines[at])); at++) inner.push(match[1]);
      const quote = element("blockquote");
      quote.append(markdown(inner.join("\n")));
      made.append(quote);
    } else if (ITEM.test(line)) {
      at = list(made, lines, at, block);
    } else {
      const paragraph = [];
      for (; at < lines.length && lines[at].trim() && (!paragraph.length || !block(lines[at])); at++) paragraph.push(lines[at]);
      const text_ = element("p");
      paragraph.forEach((part, i) => {
        if (i) text_.append(element("br"));
        inline(text_, part.trimEnd()); // code without a fence keeps its indentation
      });
      made.append(text_);
    }
  }
  return made;
}

// Items, nested by their indentation; -> the first line that is not part of the list.
function list(parent, lines, at, block) {
  const [, indent, number] = ITEM.exec(lines[at]);
  const made = element(number ? "ol" : "ul", number && number !== "1" ? { start: number } : {});
  let item = null;
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (match) {
      const deeper = match[1].length - indent.length;
      if (deeper < 0 || (deeper < 2 && Boolean(match[2]) !== Boolean(number))) break;
      if (deeper >= 2 && item) {
        at = list(item, lines, at, block);
        continue;
      }
      item = inline(element("li"), match[3]);
      made.append(item);
    } else if (!lines[at].trim()) {
      if (at + 1 >= lines.length || !ITEM.test(lines[at + 1])) break; // a blank line between items does not end them
    } else if (block(lines[at]) || !lines[at - 1].trim()) {
      break;
    } else {
      inline(item, " " + lines[at].trim());
    }
    at++;
  }
  parent.append(made);
  return at;
}
