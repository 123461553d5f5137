// Helpers to create elements and format values.

export const $ = (id) => document.getElementById(id);

export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function button(label, act, properties = {}) {
  const element = el("button", { type: "button", ...properties }, label);
  element.addEventListener("click", act);
  return element;
}

// Text with visible white space.
export const visible = (text) =>
  text.replace(/^ /, "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ +$/, (s) => "␣".repeat(s.length)) || "∅";

// A token as it is shown: a part of a character by its bytes.
export const tokenLabel = ({ text, bytes }) => (bytes ? `‹${bytes}›` : visible(text));

export function percent(p) {
  if (p === 0) return "0 %";
  if (p < 0.0001) return "< 0.01 %";
  return `${(100 * p).toFixed(p < 0.01 ? 2 : 1)} %`;
}

// Three significant digits, without an exponent.
export const rounded = (value) => value.toLocaleString("en", { maximumSignificantDigits: value < 1000 ? 3 : 4 });

// Six colour classes from likely to unlikely, one for every two bits of surprisal.
export const shadeOf = (logprob) => `p${Math.max(0, Math.min(5, Math.floor(-logprob / Math.LN2 / 2)))}`;

export const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

export const quiet = (...parts) => el("p", { className: "quiet" }, ...parts);

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

export const showMessage = (panel, text) => {
  panel.key = null; // what it showed before has to be drawn again
  panel.replaceChildren(quiet(text));
};

// A part of a panel that can be opened.
export function section(title, about, ...parts) {
  return el("details", { className: "section" }, el("summary", {}, title), quiet(about), ...parts);
}
