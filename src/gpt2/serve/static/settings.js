// The settings of a request: sliders, and text fields with one value per line. A number may lie beyond its slider, up to
// `most`.

import { $, el } from "./dom.js";

export const SETTINGS = [
  { name: "temperature", label: "Temperature", max: 2, most: 1e6, step: 0.05, value: 1, where: "sliders", about: "0 is greedy" },
  { name: "top_k", label: "Top-k", max: 200, most: 2 ** 31, step: 1, value: 50, where: "sliders", about: "the k most likely tokens; 0 for all" },
  { name: "top_p", label: "Top-p", min: 0.01, least: 1e-9, max: 1, step: 0.01, value: 1, where: "sliders", about: "the most likely tokens that sum to p" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, least: 1e-6, most: 1e6, step: 0.05, value: 1, where: "sliders", about: "above 1 avoids repetition" },
  { name: "max_tokens", label: "Length", min: 1, max: 500, most: 2 ** 31, step: 1, value: 60, where: "sliders", about: "maximum new tokens" },
  { name: "min_p", label: "Min-p", max: 1, step: 0.01, value: 0, where: "more", about: "at least p times the largest probability" },
  { name: "typical_p", label: "Typical-p", min: 0.01, least: 1e-9, max: 1, step: 0.01, value: 1, where: "more", about: "closest to the expected surprisal" },
  { name: "epsilon_cutoff", label: "Epsilon cutoff", max: 0.1, most: 0.999999, step: 0.001, value: 0, where: "more", about: "minimum probability" },
  { name: "eta_cutoff", label: "Eta cutoff", max: 0.1, most: 0.999999, step: 0.001, value: 0, where: "more", about: "minimum that depends on the entropy" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, least: -1e6, most: 1e6, step: 0.1, value: 0, where: "more", about: "once for each token that occurred" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, least: -1e6, most: 1e6, step: 0.1, value: 0, where: "more", about: "for each occurrence" },
  { name: "no_repeat_ngram_size", label: "No repeated runs of", max: 8, most: 2 ** 31, step: 1, value: 0, where: "more", about: "tokens; 0 to disable" },
  { name: "min_new_tokens", label: "Shortest", max: 100, most: 2 ** 31, step: 1, value: 0, where: "ending", about: "minimum new tokens" },
  { name: "seed", label: "Seed", max: 999, most: Number.MAX_SAFE_INTEGER, step: 1, value: 42, where: "ending", about: "the same seed, the same text" },
];

// Settings with one value per line, kept as typed.
const LINES = [
  { name: "logit_bias", label: "Logit bias", where: "more", about: 'id=bias or "text"=bias, one per line', hint: '"Rome"=5\n50256=-100' },
  { name: "bad_words", label: "Bad words", where: "more", about: "never generated; one per line", hint: "" },
  { name: "stop", label: "Stop at", where: "ending", about: "stop strings; one per line, \\n for a new line", hint: "" },
];

export function defaults() {
  const numbers = SETTINGS.map(({ name, value }) => [name, value]);
  return Object.fromEntries([...numbers, ...LINES.map(({ name }) => [name, ""])]);
}

// Settings from a link or the browser's storage; anything else in it is dropped.
export function validSettings(given) {
  const settings = defaults();
  for (const setting of SETTINGS) if (problemOf(setting, given?.[setting.name]) === null) settings[setting.name] = given[setting.name];
  for (const { name } of LINES) if (typeof given?.[name] === "string") settings[name] = given[name].slice(0, 10000);
  return settings;
}

// What is wrong with a number, or null.
function problemOf({ min = 0, max, least = min, most = max, step }, value) {
  if (!Number.isFinite(value)) return "a number is required";
  if (step === 1 && !Number.isInteger(value)) return "a whole number is required";
  if (value < least) return least === 1e-9 || least === 1e-6 ? "must be above 0" : `must be at least ${least}`;
  if (value > most) return most === 0.999999 ? "must be below 1" : `must be at most ${most.toLocaleString("en")}`;
  return null;
}

export const linesOf = (typed) => typed.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));

// The lines of a logit bias as [id or text, bias], and the invalid lines.
export function biasesOf(typed) {
  const pairs = [], unread = [];
  for (const line of typed.split("\n").filter((each) => each.trim())) {
    const [, what, bias] = line.match(/^\s*(\d+|".+")\s*=\s*([-+]?\d*\.?\d+(?:e[-+]?\d+)?)\s*$/i) ?? [];
    try {
      pairs.push([JSON.parse(what), Number(bias)]);
    } catch {
      unread.push(line.trim());
    }
  }
  return { pairs, unread };
}

// Draws the controls; the returned function shows settings in them, except in the focused one.
export function drawSettings(onInput) {
  const shows = [...SETTINGS.map((setting) => drawNumber(setting, onInput)), ...LINES.map((setting) => drawLines(setting, onInput))];
  return (settings) => shows.forEach((show) => show(settings));
}

function frame(where, id, label, about, ...inputs) {
  const hint = el("small", { id: `${id}-about`, title: about }, about);
  $(where).append(el("div", { className: "setting" }, el("label", { htmlFor: id, title: about }, label), hint, ...inputs));
  return hint;
}

function drawNumber(setting, onInput) {
  const { name, label, min = 0, max, step, where, about } = setting;
  const id = `set-${name}`;
  const number = el("input", { id, type: "number", min, step: "any", "aria-describedby": `${id}-about` });
  const range = el("input", { type: "range", min, max, step, "aria-label": `${label}, slider` });
  const note = frame(where, id, label, about, number, range);
  const fill = () => range.style.setProperty("--fill", `${(100 * (range.value - min)) / (max - min)}%`);
  const check = (problem) => {
    number.setAttribute("aria-invalid", String(problem !== null));
    note.textContent = problem ?? about;
  };
  const take = (from, to) => {
    if (from.value === "") return;
    to.value = from.value;
    fill();
    const problem = problemOf(setting, Number(from.value));
    check(problem);
    if (problem === null) onInput(name, Number(from.value));
  };
  range.addEventListener("input", () => take(range, number));
  number.addEventListener("input", () => take(number, range));
  number.addEventListener("change", () => number.value === "" && take(range, number));
  return (settings) => {
    for (const input of [number, range]) if (input !== document.activeElement) input.value = settings[name];
    if (number !== document.activeElement) check(null);
    fill();
  };
}

function drawLines({ name, label, where, about, hint }, onInput) {
  const id = `set-${name}`;
  const input = el("textarea", { id, rows: 1, spellcheck: false, placeholder: hint, "aria-describedby": `${id}-about` });
  const note = frame(where, id, label, about, input);
  input.addEventListener("input", () => onInput(name, input.value));
  return (settings) => {
    if (input !== document.activeElement) input.value = settings[name];
    const [unread] = name === "logit_bias" ? biasesOf(settings[name]).unread : [];
    input.setAttribute("aria-invalid", String(unread !== undefined));
    note.textContent = unread === undefined ? about : `not id=bias or "text"=bias: ${unread}`;
  };
}
