// Models and settings of side A, and of side B for comparison.

import { $, el } from "./dom.js";
import { drawSettings, defaults, SETTINGS } from "./settings.js";
import { render, onRender, settings, infoOf, state } from "./state.js";
import { goTo } from "./tree.js";
import { remember } from "./undo.js";

export function fillModels() {
  const names = state.models.map(({ name }) => name);
  for (const id of ["model", "model-b"]) $(id).replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  state.sides.A.model = state.sides.B.model = names[0];
}

function drawSides() {
  const { A, B } = state.sides;
  const on = state.comparing;
  [$("model").value, $("model-b").value] = [A.model, B.model];
  const differences = differencesOf(A, B);
  for (const name of ["A", "B"]) $(`side-${name}`).textContent = labelOf(state.sides[name], differences);
  $("compare").setAttribute("aria-pressed", String(on));
  $("sides").hidden = $("label-A").hidden = $("sheet-b").hidden = !on;
  $("show-a").setAttribute("aria-pressed", String(state.shown === "A"));
  $("show-b").setAttribute("aria-pressed", String(state.shown === "B"));
  $("model-b").hidden = state.shown !== "B";
  $("adopt").disabled = state.running !== null || state.leafB === null;
  document.body.classList.toggle("comparing", on);
  const info = infoOf(A.model);
  if (!info) return;
  const millions = (info.parameters / 1e6).toFixed(info.parameters < 1e7 ? 1 : 0);
  $("shape").textContent = `${millions} M parameters, ${info.n_layer} layers of ${info.n_head} heads, context ${info.block_size}`;
}

// The settings by which the sides differ; the seed is always that of A.
const differencesOf = (A, B) => Object.keys(A.settings).filter((name) => name !== "seed" && A.settings[name] !== B.settings[name]);

function labelOf({ model, settings: given }, differences) {
  const nameOf = (name) => (SETTINGS.find((setting) => setting.name === name)?.label ?? name.replaceAll("_", " ")).toLowerCase();
  const parts = differences.length ? differences : ["temperature", "top_k"];
  return [model, ...parts.map((name) => `${nameOf(name)} ${given[name] === "" ? "none" : given[name]}`)].join(", ");
}

function pickModel(name, model) {
  state.sides[name].model = model;
  state.selected = null;
  render();
}

// A comparison begins with one difference: the model if there is another one, else the temperature.
function compare() {
  const { A, B } = state.sides;
  state.comparing = !state.comparing;
  if (state.comparing) {
    const other = state.models.find(({ name }) => name !== A.model);
    B.model = other?.name ?? A.model;
    B.settings = { ...A.settings };
    if (!other) B.settings.temperature = A.settings.temperature === 0.5 ? 1 : 0.5;
  }
  state.shown = state.comparing ? "B" : "A";
  state.tab = "settings";
  state.leafB = state.selected = null;
  state.begin.B = null;
  render();
}

function show(name) {
  state.shown = name;
  state.selected = null;
  render();
}

// Replaces the text with that of B.
function adopt() {
  goTo(state.tree, state.leafB);
  state.leafB = state.selected = null;
  state.begin = { A: state.begin.B, B: null };
  remember("adopt");
  render();
}

export function wireSides() {
  const fillSettings = drawSettings((name, value) => {
    settings()[name] = value;
    render();
  });
  onRender(drawSides);
  onRender(() => fillSettings(settings()));
  $("model").addEventListener("change", () => pickModel("A", $("model").value));
  $("model-b").addEventListener("change", () => pickModel("B", $("model-b").value));
  $("compare").addEventListener("click", compare);
  $("show-a").addEventListener("click", () => show("A"));
  $("show-b").addEventListener("click", () => show("B"));
  $("adopt").addEventListener("click", adopt);
  $("reset").addEventListener("click", () => {
    state.sides[state.shown].settings = defaults();
    render();
  });
}
