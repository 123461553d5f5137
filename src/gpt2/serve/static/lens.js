// The logit lens by layer and position: the token that each layer would predict after each token of the text.

import { requestJson } from "./api.js";
import { addArrowKeys, button, el, percent, quiet, tokenLabel, visible } from "./dom.js";
import { legend } from "./scale.js";

const POSITIONS = 24;
let isTop = true; // whether the colour is the probability of the layer's own token, or that of the token that follows

// about: from subject.js.
export async function fillLensMap(panel, { info, ids, chosen }, signal) {
  const key = `${info.name} ${chosen?.token.id} ${ids}`;
  if (panel.key === key) return;
  const body = { model: info.name, tokens: ids, positions: POSITIONS, asked: chosen?.token.id };
  const result = await requestJson("inspect/lens-map", body, signal);
  panel.key = key;
  draw(panel, result);
}

function draw(panel, result) {
  const { tokens, following, first, layers, names } = result;
  const readout = el("p", { className: "readout", role: "status" });
  const head = el("tr", {}, el("th", { scope: "col" }, "Layer"), ...tokens.map(({ text }, i) => el("th", { scope: "col", title: `token ${first + i + 1}` }, visible(text))));
  const table = el("table", { className: "lens map" }, el("thead", {}, head)), rows = el("tbody");
  const cells = [];
  [...layers.keys()].reverse().forEach((l) => {
    const row = el("tr", {}, el("th", { scope: "row" }, l ? String(l) : "in"));
    layers[l].forEach(([id, probability, target], i) => {
      const label = tokenLabel(names[id]), next = following[i];
      const words = `Layer ${l || "in"}, after ${visible(tokens[i].text)}: ${label} ${percent(probability)}${next === null ? "" : `; ${visible(next)}, which follows, ${percent(target)}`}`;
      const cell = el("button", { type: "button", tabIndex: cells.length ? -1 : 0, "aria-label": words, className: names[id].text === next ? "same" : "" }, label);
      for (const event of ["focus", "pointerenter"]) cell.addEventListener(event, () => (readout.textContent = words));
      cells.push({ cell, probability, target });
      row.append(el("td", {}, cell));
    });
    rows.append(row);
  });
  table.append(rows);
  addArrowKeys(table, "button", tokens.length);
  const paint = () => cells.forEach(({ cell, probability, target }) => cell.style.setProperty("--weight", isTop ? probability : target));
  const modes = [[true, "Its own token"], [false, "The token that follows"]].map(([value, label]) => [value, button(label, () => {
    isTop = value;
    mark();
    paint();
  })]);
  const mark = () => modes.forEach(([value, each]) => each.setAttribute("aria-pressed", String(value === isTop)));
  mark();
  paint();
  const choice = el("div", { className: "segments", role: "group", "aria-label": "Probability that is shown" }, ...modes.map(([, each]) => each));
  const scroll = el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Logit lens by layer and position" }, table);
  panel.replaceChildren(el("h2", {}, "By position"), quiet("The token that each layer would predict after each token of the text; bold where it is the one that follows."), choice, scroll, readout, legend("probability", "0", "100 %", "probability"));
  scroll.scrollLeft = scroll.scrollWidth;
}
