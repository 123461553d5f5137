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

// Text with visible white space.
export const visible = (text) =>
  text.replace(/^ /, "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ +$/, (s) => "␣".repeat(s.length)) || "∅";

export function percent(p) {
  if (p === 0) return "0 %";
  if (p < 0.0001) return "< 0.01 %";
  return `${(100 * p).toFixed(p < 0.01 ? 2 : 1)} %`;
}

// Six colour classes from likely to unlikely, one for every two bits of surprisal.
export const shadeOf = (logprob) => `p${Math.max(0, Math.min(5, Math.floor(-logprob / Math.LN2 / 2)))}`;

export const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
