// A tree of what was typed and said. A node is a token that a model said, or a run of text that somebody typed;
// the text in the editor is the path from the root to the leaf. Nothing that was said is ever lost by editing.

export function makeTree() {
  const root = makeNode(null, "");
  return { root, leaf: root };
}

function makeNode(parent, text, said = null) {
  return { parent, text, said, children: [], last: null };
}

export function add(parent, text, said = null) {
  const same = parent.children.find((child) => isSame(child, text, said));
  const child = same ?? makeNode(parent, text, said);
  if (!same) parent.children.push(child);
  parent.last = child;
  return child;
}

// More text for what was said last: the end of a character, or what might have been a stop string.
export function lengthen(leaf, text) {
  if (!leaf.said) return add(leaf, text);
  const parent = leaf.children.length ? leaf.parent : forget(leaf);
  return add(parent, leaf.text + text, leaf.said);
}

function isSame(child, text, said) {
  if (!said || !child.said) return !said && !child.said && child.text === text;
  return child.text === text && child.said.id === said.id && child.said.vocabulary === said.vocabulary;
}

export function pathTo(node) {
  const path = [];
  for (let at = node; at.parent; at = at.parent) path.push(at);
  return path.reverse();
}

export const textOf = (path) => path.map((node) => node.text).join("");

// Follows what was said last, down to its end.
export function endOf(node) {
  while (node.last) node = node.last;
  return node;
}

export function goTo(tree, node) {
  for (let at = node; at.parent; at = at.parent) at.parent.last = at;
  tree.leaf = node;
}

// The text was changed in the editor: what still stands is kept, the rest becomes typed text.
export function edit(tree, text) {
  const path = pathTo(tree.leaf);
  let kept = tree.root, length = 0;
  for (const node of path) {
    if (!text.startsWith(node.text, length)) break;
    length += node.text.length;
    if (node.text) kept = node; // one without text is a part of a character, and stands or falls with it
  }
  let rest = text.slice(length);
  if (rest && kept.parent && !kept.said && !kept.children.length) {
    rest = kept.text + rest;
    kept = forget(kept);
  }
  forgetTyped(tree, path, kept);
  tree.leaf = rest ? add(kept, rest) : kept;
  if (!rest) kept.last = null;
}

// A half-typed word is not worth a branch.
function forgetTyped(tree, path, kept) {
  for (let i = path.length - 1; i >= 0 && path[i] !== kept; i--) {
    if (path[i].said || path[i].children.length) return;
    forget(path[i]);
  }
}

function forget(node) {
  const { parent } = node;
  parent.children = parent.children.filter((child) => child !== node);
  if (parent.last === node) parent.last = null;
  return parent;
}

// Where each node of a path stands in the text.
export function spansOf(path) {
  let start = 0;
  return path.map((node) => ({ node, start, end: (start += node.text.length) }));
}

export const begunByModel = (path) => !path.length || path[0].said !== null;

// A path as plain data, and back.
export const packed = (path) => path.map(({ text, said }) => (said ? [text, said.id, said.logprob, said.vocabulary] : text));

export function unpacked(tree, items) {
  let at = tree.root;
  for (const item of items) {
    const [text, id, logprob, vocabulary] = Array.isArray(item) ? item : [item];
    if (typeof text !== "string") continue;
    const said = Number.isInteger(id) ? { id, logprob: Number(logprob), vocabulary: String(vocabulary) } : null;
    if (text || said) at = add(at, text, said);
  }
  goTo(tree, at);
}
