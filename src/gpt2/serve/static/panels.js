// The panels of layers, tokens and the tree.

import { addArrowKeys, el, percent, quiet, rounded, shadeOf, tokenLabel, visible } from "./dom.js";
import { pathTo } from "./tree.js";

// The prediction of each layer (logit lens), the last one on top.
export function drawLayers(panel, { layers }, word) {
  const table = el("table", { className: "lens" });
  const headings = [["Layer", 1], ["Prediction", 3], [`Probability of ${visible(word)}`, 1]];
  table.append(el("thead", {}, el("tr", {}, ...headings.map(([name, colSpan]) => el("th", { scope: "col", colSpan }, name)))));
  const body = el("tbody");
  for (const layer of [...layers].reverse()) {
    const row = el("tr", {}, el("th", { scope: "row" }, layer.layer === 0 ? "in" : String(layer.layer)));
    for (const token of layer.tokens.slice(0, 3)) {
      const cell = el("td", { title: percent(token.probability) }, tokenLabel(token));
      cell.style.setProperty("--weight", token.probability);
      if (token.text === word) cell.className = "same";
      row.append(cell);
    }
    row.append(el("td", { className: "number" }, layer.asked === null ? "" : percent(layer.asked)));
    body.append(row);
  }
  table.append(body);
  const intro = quiet("The prediction of each layer (logit lens) in place of ", el("b", {}, visible(word)), ".");
  panel.replaceChildren(intro, el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Layers" }, table));
}

// Every token of the text with its probability and rank. The tokens of one character are grouped: {text, start} each.
export function drawTokens(panel, tokens, perplexity, text, onPick) {
  const number = el("p", { className: "big" }, perplexity === null ? "–" : rounded(perplexity), el("small", {}, " perplexity"));
  const meaning = perplexity === null ? "" : `, ${Math.log2(perplexity).toFixed(2)} bits each: on average as uncertain as a choice among ${rounded(perplexity)} tokens`;
  const note = quiet(`${tokens.length} tokens${meaning}. Arrow keys move, Enter shows the alternatives.`);
  const list = el("div", { className: "tokens", role: "group", "aria-label": "Tokens of the text" });
  const buttons = tokens.map((token, i) => tokenButton(token, i, onPick));
  for (let i = 0; i < tokens.length; ) {
    let end = i + 1;
    while (tokens[i].bytes && end < tokens.length && tokens[end].bytes && tokens[end].start === tokens[i].start) end++;
    const isGroup = end - i > 1;
    const character = text.slice(tokens[i].start, tokens[end]?.start);
    list.append(...(isGroup ? [el("span", { className: "character", title: `${end - i} tokens for ${character}` }, el("b", {}, character), ...buttons.slice(i, end))] : [buttons[i]]));
    i = end;
  }
  addArrowKeys(list, "button");
  panel.replaceChildren(number, note, list);
}

function tokenButton(token, i, onPick) {
  const known = token.logprob !== null; // the first token has no context
  const probability = known ? `${percent(Math.exp(token.logprob))}, rank ${token.rank}` : "first token";
  const label = token.bytes ?? visible(token.text);
  const one = el("button", { type: "button", className: `${known ? shadeOf(token.logprob) : ""}${token.text.endsWith("\n") ? " broken" : ""}`, tabIndex: i ? -1 : 0,
    title: `token ${token.id}, ${probability}`, "aria-label": `${token.bytes ?? (token.text.trim() || visible(token.text))}, token ${token.id}, ${probability}` }, label);
  one.addEventListener("click", () => onPick(i, one));
  return one;
}

// The tree: a branch for each continuation.
export function drawTree(panel, tree, onPick) {
  const here = new Set([tree.root, ...pathTo(tree.leaf)]);
  const list = branches(tree.root, here, tree.leaf, onPick);
  panel.replaceChildren(quiet("All continuations of the text. Select a branch to return to it."), list.children.length ? list : quiet("Nothing yet."));
}

function branches(node, here, leaf, onPick) {
  const list = el("ul", { className: "tree" });
  for (const child of node.children) list.append(branch(child, here, leaf, onPick));
  return list;
}

function branch(first, here, leaf, onPick) {
  let last = first, text = first.text, holdsLeaf = first === leaf;
  while (last.children.length === 1) {
    last = last.children[0];
    text += last.text;
    holdsLeaf ||= last === leaf;
  }
  const words = text.replace(/\s+/g, " ");
  const button = el("button", { type: "button", title: text }, words.length > 64 ? `${words.slice(0, 62)}…` : words.trim() ? words : "␣");
  if (here.has(first)) button.className = "on";
  if (holdsLeaf) button.setAttribute("aria-current", "true");
  const end = last;
  button.addEventListener("click", () => onPick(end));
  const item = el("li", {}, button);
  if (last.children.length) item.append(branches(last, here, leaf, onPick));
  return item;
}
