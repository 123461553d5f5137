// A tree of typed text and generated tokens. A node is a generated token or a run of typed text; the text of the editor
// is the path from the root to the leaf. Editing never deletes generated tokens.

export function makeTree() {
  const root = makeNode(null, "");
  return { root, leaf: root };
}

function makeNode(parent, text, generated = null) {
  return { parent, text, generated, children: [], last: null };
}

export function add(parent, text, generated = null) {
  const same = parent.children.find((child) => isSame(child, text, generated));
  const child = same ?? makeNode(parent, text, generated);
  if (!same) parent.children.push(child);
  parent.last = child;
  return child;
}

// Appends text to the last token: the rest of a character, or text that was held back as a possible stop string.
export function appendToLeaf(leaf, text) {
  if (!leaf.generated) return add(leaf, text);
  const parent = leaf.children.length ? leaf.parent : forget(leaf);
  return add(parent, leaf.text + text, leaf.generated);
}

function isSame(child, text, generated) {
  if (!generated || !child.generated) return !generated && !child.generated && child.text === text;
  return child.text === text && child.generated.id === generated.id && child.generated.vocabulary === generated.vocabulary;
}

export function pathTo(node) {
  const path = [];
  for (let at = node; at.parent; at = at.parent) path.push(at);
  return path.reverse();
}

export const textOf = (path) => path.map((node) => node.text).join("");

// The leaf below a node, by the last used child of each node.
export function endOf(node) {
  while (node.last) node = node.last;
  return node;
}

export function goTo(tree, node) {
  for (let at = node; at.parent; at = at.parent) at.parent.last = at;
  tree.leaf = node;
}

// Updates the tree after an edit: nodes that are still a prefix of the text are kept, the rest becomes typed text.
export function edit(tree, text) {
  const path = pathTo(tree.leaf);
  let kept = tree.root, length = 0;
  for (const node of path) {
    if (!text.startsWith(node.text, length)) break;
    length += node.text.length;
    if (node.text) kept = node; // a node without text is part of a character, and is kept with it
  }
  let rest = text.slice(length);
  if (rest && kept.parent && !kept.generated && !kept.children.length) {
    rest = kept.text + rest;
    kept = forget(kept);
  }
  removeTyped(tree, path, kept);
  tree.leaf = rest ? add(kept, rest) : kept;
  if (!rest) kept.last = null;
}

// Removes typed nodes without children: text that was typed in between gets no branch.
function removeTyped(tree, path, kept) {
  for (let i = path.length - 1; i >= 0 && path[i] !== kept; i--) {
    if (path[i].generated || path[i].children.length) return;
    forget(path[i]);
  }
}

function forget(node) {
  const { parent } = node;
  parent.children = parent.children.filter((child) => child !== node);
  if (parent.last === node) parent.last = null;
  return parent;
}

// The start and end of each node of a path in the text.
export function spansOf(path) {
  let start = 0;
  return path.map((node) => ({ node, start, end: (start += node.text.length) }));
}

export const startsGenerated = (path) => !path.length || path[0].generated !== null;

// A path as plain data, and back.
export const serialize = (path) => path.map(({ text, generated }) => (generated ? [text, generated.id, generated.logprob, generated.vocabulary] : text));

export function deserialize(tree, items) {
  let at = tree.root;
  for (const item of items) {
    const [text, id, logprob, vocabulary] = Array.isArray(item) ? item : [item];
    if (typeof text !== "string") continue;
    const generated = Number.isInteger(id) ? { id, logprob: Number(logprob), vocabulary: String(vocabulary) } : null;
    if (text || generated) at = add(at, text, generated);
  }
  goTo(tree, at);
}
