// Numbers as people read them, and elements as scripts make them.

// Two significant digits, without an exponent: 0.0000031.
export function usd(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const digits = value >= 0.1 ? 2 : 1 - Math.floor(Math.log10(value));
  return value.toFixed(Math.min(digits, 20));
}

export function count(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString("en-US");
}

// Three significant digits at most, for speeds.
export function rate(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value >= 100 ? Math.round(value).toLocaleString("en-US") : value >= 10 ? value.toFixed(1) : value.toFixed(value ? 2 : 0);
}

export function duration(milliseconds) {
  if (milliseconds === null || milliseconds === undefined) return "–";
  if (milliseconds < 1000) return `${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms`;
  return milliseconds < 60000 ? `${(milliseconds / 1000).toFixed(milliseconds < 10000 ? 2 : 1)} s` : `${(milliseconds / 60000).toFixed(1)} min`;
}

export const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`);

export function median(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// element("p", {class: "note"}, "text", child)
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
