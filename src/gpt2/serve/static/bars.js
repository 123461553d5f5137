// Bars of probabilities, and the card of a token.

import { button, clamp, el, percent, tokenLabel, visible } from "./dom.js";

// Bars of probabilities after the sampling parameters, with a tick at the probability of the model.
export function drawBars(list, tokens, onPick = null, selected = null) {
  const most = Math.max(1e-9, ...tokens.map((token) => Math.max(token.probability, token.raw)));
  list.replaceChildren(...tokens.map((token) => bar(token, most, onPick, token.id === selected)));
}

function bar(token, most, onPick, isChosen) {
  const word = el("span", { className: "word" }, tokenLabel(token));
  const [own, after] = [el("i", { className: "own" }), el("i", { className: "after" })];
  own.style.width = `${(100 * token.raw) / most}%`;
  after.style.width = `${(100 * token.probability) / most}%`;
  const track = el("span", { className: "track", "aria-hidden": "true" }, own, after);
  const parts = [word, track, el("span", { className: "number" }, percent(token.probability))];
  const state = token.probability === 0 ? "out" : "";
  if (!onPick) return el("li", { className: state }, ...parts);
  const title = `${percent(token.probability)} with the settings, ${percent(token.raw)} without; token ${token.id}`;
  const pick = el("button", { type: "button", className: state, title }, ...parts);
  if (isChosen) pick.setAttribute("aria-current", "true");
  pick.addEventListener("click", () => onPick(token));
  return el("li", {}, pick);
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
  const head = el("p", { className: "head" }, el("b", {}, asked?.bytes ? tokenLabel(asked) : visible(word)));
  if (asked) {
    const same = percent(asked.raw) === percent(asked.probability);
    head.append(same ? ` ${percent(asked.raw)}` : ` ${percent(asked.probability)} with these settings, ${percent(asked.raw)} without`, `, rank ${rank}`, el("small", {}, `, token ${asked.id}`));
  }
  const list = el("ol", { className: "bars" });
  const isShown = !asked || result.tokens.some((token) => token.id === asked.id);
  drawBars(list, isShown ? result.tokens : [...result.tokens.slice(0, -1), asked], actions.pick, asked?.id);
  const note = el("p", { className: "quiet note" }, "Bars are probabilities with the settings, ticks without them.");
  const row = el("div", { className: "row" });
  for (const [name, act] of Object.entries(actions.more)) row.append(button(name, act, { className: "plain" }));
  row.append(button("✕", actions.close, { className: "plain", "aria-label": "Close" }));
  card.replaceChildren(head, list, note, row);
}
