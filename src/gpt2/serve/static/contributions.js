// What each head and MLP adds to the logit of a token, or to its difference from that of another one.

import { requestJson } from "./api.js";
import { addArrowKeys, el, quiet, showMessage, tokenLabel, visible } from "./dom.js";
import { chooseHead, headName } from "./heads.js";
import { runLatestAndReport } from "./notice.js";
import { legend, tint } from "./scale.js";
import { render, state } from "./state.js";
import { subject } from "./subject.js";

const SHOWN = 8; // of the largest contributions

export const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

export async function fillContributions(panel, signal) {
  const about = await subject(signal);
  if (!about) return showMessage(panel, "Write something first.");
  const key = `${about.info.name} ${about.token.id} ${about.ids}`;
  if (panel.key === key) return; // the focus may be inside
  const others = about.likely.filter(({ id }) => id !== about.token.id);
  const select = el("select", { id: "alternative" }, ...others.map((token) => el("option", { value: token.id }, tokenLabel(token))), el("option", { value: "" }, "no other token"));
  const place = about.chosen ? "the chosen token" : "the most likely next token";
  const intro = el("p", {}, "Why ", el("b", { className: "token" }, visible(about.token.text)), ` (${place}), and not `, el("label", { className: "hidden", htmlFor: "alternative" }, "Alternative"), select, "?");
  const result = el("div", { className: "view" });
  const update = async (of) => {
    const alternative = select.value === "" ? null : Number(select.value);
    const parts = await requestJson("inspect/contributions", { model: about.info.name, tokens: about.ids, target: about.token.id, alternative }, of);
    draw(result, parts, about, alternative === null ? null : others.find(({ id }) => id === alternative));
  };
  await update(signal);
  select.addEventListener("change", runLatestAndReport(0, update));
  panel.key = key;
  panel.replaceChildren(intro, result);
}

function draw(result, parts, { info, token }, other) {
  const most = Math.max(1e-9, ...parts.heads.flat().map(Math.abs), ...parts.mlps.map(Math.abs));
  const readout = el("p", { className: "readout", role: "status" });
  const named = parts.heads.flatMap((layer, l) => [...layer.map((value, h) => ({ name: headName(l, h), value, l, h })), { name: `MLP of layer ${l + 1}`, value: parts.mlps[l], l, h: null }]);
  const grid = el("div", { className: "heads effect", role: "group", "aria-label": "Contributions, by layer: heads, then the MLP" }, ...named.map((part, i) => square(part, i, most, readout)));
  grid.style.setProperty("--heads", info.n_head + 1);
  addArrowKeys(grid, "button", info.n_head + 1);
  const biases = parts.attn_bias.reduce((sum, value) => sum + value, 0) + parts.bias;
  const embeddings = parts.embed + parts.pos_embed;
  const heads = parts.heads.flat().reduce((sum, value) => sum + value, 0), mlps = parts.mlps.reduce((sum, value) => sum + value, 0);
  const what = other ? `logit of ${visible(token.text)} minus logit of ${tokenLabel(other)}` : `logit of ${visible(token.text)}`;
  const sum = quiet(`${what}: ${signed(parts.total)} = heads ${signed(heads)}, MLPs ${signed(mlps)}, embeddings ${signed(embeddings)}, biases ${signed(biases)}. The last column of squares is the MLPs. Select a head to see its attention.`);
  const order = [...named].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, SHOWN);
  const list = el("ol", { className: "bars effect", "aria-label": "Largest contributions" }, ...order.map((part) => bar(part, most)));
  const against = other ? `for ${tokenLabel(other)}` : "against";
  result.replaceChildren(grid, readout, legend("effect", signed(-most), signed(most), `${against} … for ${visible(token.text)}`), sum, list);
}

function square({ name, value, l, h }, i, most, readout) {
  const element = el("button", { type: "button", tabIndex: i ? -1 : 0, "aria-label": `${name}: ${signed(value)}` });
  if (h === null) element.className = "mlp";
  tint(element, value / most);
  for (const event of ["focus", "pointerenter"]) element.addEventListener(event, () => (readout.textContent = `${name}: ${signed(value)}`));
  element.addEventListener("click", () => {
    if (h === null) return;
    chooseHead(l, h);
    [state.tab, state.view] = ["attention", "heads"];
    render();
    document.getElementById("tab-attention").focus();
  });
  return element;
}

function bar({ name, value }, most) {
  const fill = el("i", { className: `after${value < 0 ? " against" : ""}` });
  fill.style.width = `${(100 * Math.abs(value)) / most}%`;
  return el("li", {}, el("span", { className: "word" }, name), el("span", { className: "track", "aria-hidden": "true" }, fill), el("span", { className: "number" }, signed(value)));
}
