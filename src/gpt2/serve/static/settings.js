// The sliders, one for each sampler, and what else a request says.

import { el } from "./dom.js";

export const SETTINGS = [
  { name: "temperature", label: "Temperature", max: 2, step: 0.05, value: 1, where: "sliders", about: "0 always takes the likeliest" },
  { name: "top_k", label: "Top-k", max: 200, step: 1, value: 50, where: "sliders", about: "only the k likeliest; 0 for all" },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, value: 1, where: "sliders", about: "only the likeliest that sum to p" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, value: 1, where: "sliders", about: "over 1 avoids what was said" },
  { name: "max_tokens", label: "Length", min: 1, max: 500, step: 1, value: 60, where: "sliders", about: "tokens at most" },
  { name: "min_p", label: "Min-p", max: 1, step: 0.01, value: 0, where: "more", about: "at least p times as likely as the likeliest" },
  { name: "typical_p", label: "Typical-p", min: 0.01, max: 1, step: 0.01, value: 1, where: "more", about: "of the most expected surprise" },
  { name: "epsilon_cutoff", label: "Epsilon cutoff", max: 0.1, step: 0.001, value: 0, where: "more", about: "of at least this probability" },
  { name: "eta_cutoff", label: "Eta cutoff", max: 0.1, step: 0.001, value: 0, where: "more", about: "the same, following the entropy" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, value: 0, where: "more", about: "once for what was said" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, value: 0, where: "more", about: "each time it was said" },
  { name: "no_repeat_ngram_size", label: "No repeated runs of", max: 8, step: 1, value: 0, where: "more", about: "tokens; 0 for no such rule" },
  { name: "min_new_tokens", label: "Shortest", max: 100, step: 1, value: 0, where: "ending", about: "tokens before the text may end" },
  { name: "seed", label: "Seed", max: 999, step: 1, value: 42, where: "ending", about: "the same seed, the same text" },
];
const NOT_OF_CHOICE = ["max_tokens", "seed", "stop"];

export const defaults = () => ({ ...Object.fromEntries(SETTINGS.map(({ name, value }) => [name, value])), stop: [] });

// Those that say how a token is chosen.
export function samplingOf(settings) {
  return Object.fromEntries(Object.entries(settings).filter(([name]) => !NOT_OF_CHOICE.includes(name)));
}

// What came from a link or the browser's memory, with nothing in it that is no setting.
export function checked(given) {
  const settings = defaults();
  for (const { name } of SETTINGS) if (Number.isFinite(given?.[name])) settings[name] = given[name];
  if (Array.isArray(given?.stop)) settings.stop = given.stop.filter((text) => typeof text === "string" && text).slice(0, 4);
  return settings;
}

// Draws them once; the returned function shows other settings in them.
export function drawSettings(onChange) {
  const shows = SETTINGS.map((setting) => drawOne(setting, onChange));
  shows.push(drawStop(onChange));
  return (settings) => shows.forEach((show) => show(settings));
}

function drawOne({ name, label, min = 0, max, step, where, about }, onChange) {
  const id = `set-${name}`;
  const number = el("input", { id, type: "number", min, step: "any", "aria-describedby": `${id}-about` });
  const range = el("input", { type: "range", min, max, step, "aria-label": `${label}, slider`, tabIndex: 0 });
  const heading = el("label", { htmlFor: id }, label);
  const hint = el("small", { id: `${id}-about` }, about);
  document.getElementById(where).append(el("div", { className: "setting" }, heading, hint, number, range));
  const fill = () => range.style.setProperty("--fill", `${(100 * (range.value - min)) / (max - min)}%`);
  const change = (value) => {
    if (!Number.isFinite(value)) return;
    onChange(name, value);
    fill();
  };
  range.addEventListener("input", () => change(Number((number.value = range.value))));
  number.addEventListener("input", () => change(Number((range.value = number.value))));
  return (settings) => {
    number.value = range.value = settings[name];
    number.value = settings[name];
    fill();
  };
}

function drawStop(onChange) {
  const input = el("input", { id: "set-stop", type: "text", autocomplete: "off", "aria-describedby": "set-stop-about" });
  const hint = el("small", { id: "set-stop-about" }, "ends before it; \\n for a new line");
  const label = el("label", { htmlFor: "set-stop" }, "Stop at");
  document.getElementById("ending").append(el("div", { className: "setting" }, label, hint, input));
  input.addEventListener("input", () => {
    const text = input.value.replaceAll("\\n", "\n");
    onChange("stop", text ? [text] : []);
  });
  return (settings) => (input.value = (settings.stop[0] ?? "").replaceAll("\n", "\\n"));
}
