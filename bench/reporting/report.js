"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const themes = { "": ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };
  let theme = "";
  by("theme").addEventListener("click", () => {
    const names = Object.keys(themes);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    by("theme").textContent = themes[theme][0];
    by("theme").setAttribute("aria-label", "Colours: " + themes[theme][1]);
  });

  const scenarios = JSON.parse(by("scenarios").textContent);
  if (!scenarios.length) return;
  const [choice, price, list, use] = ["scenario", "device-price", "list-price", "utilisation"].map(by);
  const [low, high] = [Number(price.dataset.low), Number(price.dataset.high)];
  const digits = (value) => (value >= 0.1 ? 2 : 1 - Math.floor(Math.log10(value)));
  const usd = (value) => value.toFixed(Math.max(0, Math.min(digits(value), 12)));
  const percent = (share) => (100 * share).toFixed(share < 0.1 ? 1 : 0) + "%";
  let exact = null; // a price that was named; the slider's own steps are coarser

  for (const [i, scenario] of scenarios.entries()) choice.add(new Option(scenario.label, i));

  const setPrice = (value) => {
    exact = value;
    price.value = Math.round((1000 * Math.log(value / low)) / Math.log(high / low));
  };
  const chosenPrice = () => exact ?? low * (high / low) ** (price.value / 1000);

  function show() {
    const scenario = scenarios[choice.value];
    const hour = chosenPrice();
    const share = use.value / 100;
    const busy = (scenario.seconds * hour) / 3600;
    const wall = busy / share;
    by("price-out").value = `US$${usd(hour)} an hour`;
    by("utilisation-out").value = percent(share);
    by("busy-out").textContent = usd(busy);
    by("wall-out").textContent = usd(wall);
    by("scenario-conditions").textContent =
      "Measured: " + scenario.conditions + (scenario.utilisation === null ? "" : ` Utilisation then: ${percent(scenario.utilisation)}.`);
    for (const row of by("against").rows) {
      const api = Number(row.dataset.price);
      const even = busy / api;
      row.cells[2].textContent = wall < api ? `${percent(1 - wall / api)} below` : `${(wall / api).toFixed(wall / api < 10 ? 1 : 0)}× as much`;
      row.cells[2].className = wall < api ? "yes" : "";
      row.cells[3].textContent = even > 1 ? "none: this device cannot match it" : percent(even);
    }
    for (const mark of document.querySelectorAll(".here")) {
      const [left, right, from, to] = mark.dataset.scale.split(",").map(Number);
      const place = Math.min(1, Math.max(0, Math.log(wall / from) / Math.log(to / from)));
      mark.setAttribute("transform", `translate(${left + place * (right - left)} 8)`);
    }
  }

  choice.addEventListener("input", () => {
    const own = scenarios[choice.value].price;
    if (own) setPrice(own);
    list.value = "";
    show();
  });
  price.addEventListener("input", () => {
    exact = null;
    list.value = "";
    show();
  });
  list.addEventListener("input", () => {
    const wanted = Number(list.value) || scenarios[choice.value].price;
    if (wanted) setPrice(wanted);
    show();
  });
  use.addEventListener("input", show);
  setPrice(scenarios[0].price || 1);
  show();
})();
