// Models and settings of side A, and of side B for comparison.

import { $, el } from "./dom.js";
import { drawSettings, defaults } from "./settings.js";
import { render, onRender, settings, infoOf, state } from "./state.js";
import { add, goTo } from "./tree.js";

export function fillModels() {
  const names = state.models.map(({ name }) => name);
  for (const id of ["model", "model-b"]) $(id).replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  state.sides.A.model = names[0];
  state.sides.B.model = names[1] ?? names[0];
}

function drawSides() {
  const { A, B } = state.sides;
  const on = state.comparing;
  [$("model").value, $("model-b").value] = [A.model, B.model];
  $("side-a").querySelector("span").textContent = A.model;
  $("side-b").textContent = B.model;
  $("compare").setAttribute("aria-pressed", String(on));
  $("sides").hidden = $("side-a").hidden = $("sheet-b").hidden = !on;
  $("show-a").setAttribute("aria-pressed", String(state.shown === "A"));
  $("show-b").setAttribute("aria-pressed", String(state.shown === "B"));
  $("model-b").hidden = state.shown !== "B";
  $("adopt").disabled = state.running !== null || !state.other.length;
  document.body.classList.toggle("comparing", on);
  const info = infoOf(A.model);
  if (!info) return;
  const millions = (info.parameters / 1e6).toFixed(info.parameters < 1e7 ? 1 : 0);
  $("shape").textContent = `${millions} M parameters, ${info.n_layer} layers of ${info.n_head} heads, context ${info.block_size}`;
}

function pickModel(name, model) {
  state.sides[name].model = model;
  state.selected = null;
  render();
}

function compare() {
  state.comparing = !state.comparing;
  state.shown = state.comparing ? "B" : "A";
  state.tab = "settings";
  state.other = [];
  render();
}

function show(name) {
  state.shown = name;
  render();
}

// Replaces the text with that of B.
function adopt() {
  goTo(state.tree, state.begin);
  for (const { text, generated } of state.other) state.tree.leaf = add(state.tree.leaf, text, generated);
  state.other = [];
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
