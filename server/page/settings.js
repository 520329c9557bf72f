// The sampling drawer and the colours. Both are remembered in this browser.

const SETTINGS = "fen.settings";
const THEME = "fen.theme";
const form = document.getElementById("settings-form");
const dialog = document.getElementById("settings");

function stored(name) {
  try {
    return JSON.parse(localStorage.getItem(name)) || {};
  } catch {
    return {};
  }
}

const fields = () => [...form.elements].filter((field) => field.name);

function show() {
  for (const output of form.querySelectorAll("output")) output.value = form.elements[output.htmlFor.value].value;
}

function save() {
  const changed = fields().filter((field) => field.value !== field.defaultValue);
  localStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(changed.map((field) => [field.name, field.value]))));
  document.getElementById("open-settings").textContent = changed.length ? `Sampling (${changed.length} set)` : "Sampling";
  show();
}

// -> what a request carries: { system, ...fields of the API }
export function sampling() {
  const value = (name) => form.elements[name].value.trim();
  const body = {};
  for (const name of ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]) {
    body[name] = Number(value(name));
  }
  for (const name of ["top_k", "max_tokens", "seed"]) if (value(name) !== "") body[name] = Number(value(name));
  const stop = form.elements.stop.value.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  return { system: value("system"), body };
}

export function setUpSettings() {
  for (const [name, value] of Object.entries(stored(SETTINGS))) {
    if (form.elements[name] && typeof value === "string") form.elements[name].value = value;
  }
  save();
  form.addEventListener("input", save);
  document.getElementById("open-settings").addEventListener("click", () => dialog.showModal());
  document.getElementById("reset-settings").addEventListener("click", () => {
    form.reset();
    save();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside the drawer
  });
}

const THEMES = { "": ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };

export function setUpTheme() {
  const button = document.getElementById("theme");
  const apply = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    button.textContent = THEMES[theme][0];
    button.setAttribute("aria-label", `Colours: ${THEMES[theme][1]}`);
  };
  let theme = localStorage.getItem(THEME) || "";
  apply(theme in THEMES ? theme : (theme = ""));
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    localStorage.setItem(THEME, theme);
    apply(theme);
  });
}

// On a narrow screen one of the two is seen at a time.
export function setUpViews() {
  for (const view of ["chat", "live"]) {
    document.getElementById(`view-${view}`).addEventListener("click", () => {
      document.body.dataset.view = view;
      for (const other of ["chat", "live"]) {
        document.getElementById(`view-${other}`).setAttribute("aria-pressed", String(other === view));
      }
    });
  }
}
