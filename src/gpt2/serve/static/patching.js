// Activation patching: how far the activations of another text, in one layer and at one position, bring its answer back.

import { requestJson } from "./api.js";
import { addArrowKeys, button, el, quiet, section, visible } from "./dom.js";
import { runLatestAndReport } from "./notice.js";
import { legend, tint } from "./scale.js";
import { path, state } from "./state.js";
import { encode, idsOf, tokensOf } from "./tokens.js";
import { textOf } from "./tree.js";

const PARTS = { residual: "Residual stream", attention: "Attention output", mlp: "MLP output" };

export function patchSection(info) {
  const source = el("textarea", { id: "patch-source", rows: 2, spellcheck: false, placeholder: "Another text of as many tokens" });
  const part = el("select", { id: "patch-part" }, ...Object.entries(PARTS).map(([value, label]) => el("option", { value }, label)));
  const note = el("p", { className: "quiet", role: "status" }), box = el("div", { className: "view" });
  const useB = button("Use the text of B", () => {
    source.value = textOf(path("B"));
    source.focus();
  });
  const start = runLatestAndReport(0, async (signal) => {
    box.replaceChildren();
    const ids = idsOf(await tokensOf(path("A"), info, signal)), other = await encode(source.value, info, signal);
    if (!ids.length || !other.length) return void (note.textContent = "Both texts must have tokens.");
    if (ids.length !== other.length) return void (note.textContent = `The text has ${ids.length} tokens, and the other one ${other.length}: they must have the same number.`);
    const draw = grid(box, info);
    for (let layer = 0; layer < info.n_layer; layer++) {
      note.textContent = `Layer ${layer + 1} of ${info.n_layer}…`;
      draw(layer, await requestJson("inspect/patch", { model: info.name, tokens: ids, source: other, layer, part: part.value }, signal));
    }
    note.textContent = "";
  });
  part.addEventListener("change", () => box.children.length && start());
  const run = button("Patch", start, { className: "main", id: "patch-run" });
  const fields = [el("label", { htmlFor: "patch-source" }, "Other text"), source, el("div", { className: "row" }, el("label", { className: "hidden", htmlFor: "patch-part" }, "Activations"), part, useB, run)];
  const update = () => {
    useB.hidden = !state.comparing;
    if (state.comparing && !source.value) source.value = textOf(path("B"));
  };
  return { element: section("Patch", "Run the text with activations of another one, a layer and a position at a time.", ...fields, note, box), update };
}

// A heat map, a row for each layer with the last one on top. The returned function draws the result of a layer.
function grid(box, info) {
  const readout = el("p", { className: "readout", role: "status" });
  const table = el("table", { className: "lens map patched" }), head = el("tr"), rows = el("tbody");
  const all = Array.from({ length: info.n_layer }, (_, l) => el("tr", {}, el("th", { scope: "row" }, String(l + 1))));
  rows.append(...[...all].reverse());
  table.append(el("thead", {}, head), rows);
  return (layer, result) => {
    const { spans, values, base, source, texts } = result;
    const name = ([from, to]) => {
      const [own, other] = texts.map((row) => visible(row.slice(from, to).join("")));
      return own === other ? own : `${own} → ${other}`;
    };
    if (!box.children.length) {
      head.replaceChildren(el("th", { scope: "col" }, "Layer"), ...spans.map((span) => el("th", { scope: "col", title: `token ${span[0] + 1}` }, name(span))));
      const what = quiet("0 is the answer of the text, ", el("b", {}, visible(result.alternative.text)), ", and 1 that of the other one, ", el("b", {}, visible(result.target.text)), `. Measured: the difference of their logits, ${base.toFixed(2)} and ${source.toFixed(2)}.`);
      const scroll = el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Effect by layer and position" }, table);
      box.replaceChildren(what, scroll, readout, legend("effect", "−1", "1", "effect"));
      addArrowKeys(table, "button", spans.length);
    }
    const whole = source - base;
    all[layer].append(...spans.map((span, i) => {
      const effect = Math.abs(whole) < 1e-6 ? 0 : (values[i] - base) / whole;
      const words = `Layer ${layer + 1}, ${name(span)}: ${effect.toFixed(2)}`;
      const cell = el("button", { type: "button", tabIndex: layer || i ? -1 : 0, "aria-label": words }, effect.toFixed(2));
      tint(cell, effect);
      for (const event of ["focus", "pointerenter"]) cell.addEventListener(event, () => (readout.textContent = words));
      return el("td", {}, cell);
    }));
  };
}
