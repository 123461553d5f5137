// Drawing of probabilities, attention weights, layers, tokens and the tree.

import { $, clamp, el, percent, shadeOf, visible } from "./dom.js";
import { pathTo } from "./tree.js";

// Bars of probabilities after the sampling parameters, with a tick at the probability of the model.
export function drawBars(list, tokens, onPick = null, selected = null) {
  const most = Math.max(1e-9, ...tokens.map((token) => Math.max(token.probability, token.raw)));
  list.replaceChildren(...tokens.map((token) => bar(token, most, onPick, token.id === selected)));
}

function bar(token, most, onPick, isChosen) {
  const word = el("span", { className: "word" }, visible(token.text));
  const [own, after] = [el("i", { className: "own" }), el("i", { className: "after" })];
  own.style.width = `${(100 * token.raw) / most}%`;
  after.style.width = `${(100 * token.probability) / most}%`;
  const track = el("span", { className: "track", "aria-hidden": "true" }, own, after);
  const parts = [word, track, el("span", { className: "number" }, percent(token.probability))];
  const state = token.probability === 0 ? "out" : "";
  if (!onPick) return el("li", { className: state }, ...parts);
  const button = el("button", { type: "button", className: state }, ...parts);
  if (isChosen) button.setAttribute("aria-current", "true");
  button.addEventListener("click", () => onPick(token));
  return el("li", {}, button);
}

// Arrow keys within a group of buttons that is one stop for Tab (roving tabindex).
export function addArrowKeys(container, selector, across = 1) {
  container.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, Home: -Infinity, End: Infinity };
    const items = [...container.querySelectorAll(selector)];
    const at = items.indexOf(document.activeElement);
    if (!(event.key in steps) || at < 0) return;
    event.preventDefault();
    const next = items[clamp(at + steps[event.key], 0, items.length - 1)];
    items[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

export const showMessage = (panel, text) => panel.replaceChildren(el("p", { className: "quiet" }, text));

// One square for each head; its strength is the largest attention weight, without that of the first token.
export function drawAttention(panel, { weights, texts }, word) {
  const [layers, heads] = [weights.length, weights[0].length];
  const intro = el("p", { className: "quiet" }, "Attention weights at the position that predicts ", el("b", {}, visible(word)),
    ". A row for each layer, a square for each head: the stronger, the larger its largest weight. The first token is not counted, because many heads attend to it by default.");
  const text = el("p", { className: "looked" });
  const title = el("h2");
  const most = el("ol", { className: "bars" });
  const grid = el("div", { className: "heads", role: "group", "aria-label": "Heads, by layer" });
  grid.style.setProperty("--heads", heads);
  const show = (name, row) => {
    title.textContent = name;
    paintAttention(text, texts, row);
    drawBars(most, topPositions(row, texts));
  };
  const buttons = weights.flatMap((layer, l) => layer.map((row, h) => headButton(l, h, row)));
  buttons[0].tabIndex = 0;
  const mean = el("button", { type: "button", className: "plain", "aria-pressed": "true" }, "All heads together");
  const press = (button, name, row) => {
    for (const each of [mean, ...buttons]) each.setAttribute("aria-pressed", String(each === button));
    show(name, row);
  };
  buttons.forEach((button, i) => {
    const [l, h] = [Math.floor(i / heads), i % heads];
    button.addEventListener("click", () => press(button, `Layer ${l + 1}, head ${h + 1}`, weights[l][h]));
    button.addEventListener("focus", () => press(button, `Layer ${l + 1}, head ${h + 1}`, weights[l][h]));
  });
  const average = texts.map((_, t) => weights.flat().reduce((sum, row) => sum + row[t], 0) / (layers * heads));
  mean.addEventListener("click", () => press(mean, "All heads together", average));
  grid.append(...buttons);
  addArrowKeys(grid, "button", heads);
  panel.replaceChildren(intro, grid, mean, title, text, most);
  show("All heads together", average);
}

function headButton(l, h, row) {
  const button = el("button", { type: "button", tabIndex: -1, "aria-pressed": "false", "aria-label": `Layer ${l + 1}, head ${h + 1}` });
  button.style.setProperty("--weight", Math.max(...row.slice(row.length > 1 ? 1 : 0)));
  return button;
}

function paintAttention(text, texts, row) {
  const most = Math.max(...row.slice(row.length > 1 ? 1 : 0), 1e-9);
  text.replaceChildren(...texts.map((piece, i) => {
    const mark = el("span", { title: `${visible(piece)} ${percent(row[i])}` }, piece);
    mark.style.setProperty("--weight", Math.min(1, row[i] / most));
    return mark;
  }));
}

function topPositions(row, texts) {
  const order = row.map((weight, i) => ({ id: i, text: texts[i], probability: weight, raw: weight }));
  return order.sort((a, b) => b.raw - a.raw).slice(0, 5);
}

// The prediction of each layer (logit lens), the last one on top.
export function drawLayers(panel, { layers }, word) {
  const intro = el("p", { className: "quiet" }, "The prediction of each layer (logit lens) in place of ", el("b", {}, visible(word)),
    ".");
  const table = el("table", { className: "lens" });
  const head = ["Layer", "Prediction", "", "", `Probability of ${visible(word)}`];
  table.append(el("thead", {}, el("tr", {}, el("th", { scope: "col" }, head[0]), el("th", { scope: "col", colSpan: 3 }, head[1]),
    el("th", { scope: "col" }, head[4]))));
  const body = el("tbody");
  for (const layer of [...layers].reverse()) {
    const row = el("tr", {}, el("th", { scope: "row" }, layer.layer === 0 ? "in" : String(layer.layer)));
    for (const token of layer.tokens.slice(0, 3)) {
      const cell = el("td", { title: percent(token.probability) }, visible(token.text));
      cell.style.setProperty("--weight", token.probability);
      if (token.text === word) cell.className = "same";
      row.append(cell);
    }
    row.append(el("td", { className: "number" }, layer.asked === null ? "" : percent(layer.asked)));
    body.append(row);
  }
  table.append(body);
  panel.replaceChildren(intro, el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Layers" }, table));
}

// Every token of the text with its probability and rank.
export function drawTokens(panel, tokens, perplexity, onPick) {
  const number = el("p", { className: "big" }, perplexity === null ? "–" : perplexity.toPrecision(4).replace(/\.?0+$/, ""), el("small", {}, " perplexity"));
  const bits = perplexity === null ? "" : `, ${Math.log2(perplexity).toFixed(2)} bits each`;
  const note = el("p", { className: "quiet" }, `${tokens.length} tokens${bits}. Arrow keys move, Enter shows the alternatives.`);
  const list = el("div", { className: "tokens", role: "group", "aria-label": "Tokens of the text" });
  tokens.forEach((token, i) => {
    const known = token.logprob !== null; // the first token has no context
    const probability = known ? `${percent(Math.exp(token.logprob))}, rank ${token.rank}` : "first token";
    const button = el("button", { type: "button", className: `${known ? shadeOf(token.logprob) : ""}${token.text.endsWith("\n") ? " broken" : ""}`, tabIndex: i ? -1 : 0,
      title: probability, "aria-label": `${token.text.trim() || visible(token.text)}, ${probability}` }, visible(token.text));
    button.addEventListener("click", () => onPick(i, button));
    list.append(button);
  });
  addArrowKeys(list, "button");
  panel.replaceChildren(number, note, list);
}

// The tree: a branch for each continuation.
export function drawTree(panel, tree, onPick) {
  const here = new Set([tree.root, ...pathTo(tree.leaf)]);
  const list = branches(tree.root, here, tree.leaf, onPick);
  const intro = el("p", { className: "quiet" }, "All continuations of the text. Select a branch to return to it.");
  panel.replaceChildren(intro, list.children.length ? list : el("p", { className: "quiet" }, "Nothing yet."));
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

// Places a card below a rectangle, or above it if there is no room below.
export function placeCard(card, rect) {
  card.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = card, gap = 8;
  const above = rect.bottom + height + gap > innerHeight && rect.top > height + gap;
  const left = clamp(rect.left - 12, gap, document.documentElement.clientWidth - width - gap);
  card.style.left = `${left + scrollX}px`;
  card.style.top = `${(above ? rect.top - height - 6 : rect.bottom + 6) + scrollY}px`;
}

export function fillCard(card, result, word, actions) {
  const { asked, rank } = result;
  const head = el("p", { className: "head" }, el("b", {}, visible(word)), asked ? ` ${percent(asked.raw)}, rank ${rank}` : "");
  const list = el("ol", { className: "bars" });
  const isShown = !asked || result.tokens.some((token) => token.id === asked.id);
  drawBars(list, isShown ? result.tokens : [...result.tokens.slice(0, -1), asked], actions.pick, asked?.id);
  const row = el("div", { className: "row" });
  for (const [name, act] of Object.entries(actions.more)) {
    const button = el("button", { type: "button", className: "plain" }, name);
    button.addEventListener("click", act);
    row.append(button);
  }
  const close = el("button", { type: "button", className: "plain", "aria-label": "Close" }, "✕");
  close.addEventListener("click", actions.close);
  row.append(close);
  card.replaceChildren(head, list, row);
}
