// An export as an image: the text with the colours of its tokens.

export const SHADES = [0.05, 0.13, 0.21, 0.3, 0.4, 0.52]; // opacity of the colour for every two bits of surprisal

const WIDTH = 1000, MARGIN = 48, SIZE = 21, LINE = 38, SCALE = 2;
const MOST_LINES = 200; // what is below is left out
const [PAPER, INK, SOFT, TINT] = ["#ffffff", "#22201d", "#68625a", "16 85% 52%"];
const FONT = `${SIZE}px Charter, Georgia, serif`;

export async function asPicture(data) {
  const canvas = document.createElement("canvas"), brush = canvas.getContext("2d");
  brush.font = FONT;
  const pieces = layOut(data.tokens, (text) => brush.measureText(text).width);
  const lines = Math.min(MOST_LINES, pieces.length ? pieces.at(-1).line + 1 : 1);
  const height = 2 * MARGIN + (lines + 1) * LINE;
  [canvas.width, canvas.height] = [WIDTH * SCALE, height * SCALE];
  brush.scale(SCALE, SCALE);
  brush.fillStyle = PAPER;
  brush.fillRect(0, 0, WIDTH, height);
  brush.font = FONT;
  for (const piece of pieces) if (piece.line < lines) drawPiece(brush, piece);
  brush.font = "14px system-ui, sans-serif";
  brush.fillStyle = SOFT;
  const cut = pieces.some(({ line }) => line >= lines) ? " (the beginning)" : "";
  brush.fillText(`${data.model}, temperature ${data.settings.temperature}, top-k ${data.settings.top_k}${cut}: likely to unlikely tokens, those of the model underlined`, MARGIN + 108, height - MARGIN + 4);
  SHADES.forEach((shade, i) => {
    brush.fillStyle = `hsl(${TINT} / ${shade})`;
    brush.fillRect(MARGIN + 16 * i, height - MARGIN - 6, 16, 10);
  });
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

// Breaks the tokens into lines: {text, x, line, width, token} each. A word moves to the next line as a whole.
function layOut(tokens, widthOf) {
  const pieces = [];
  let x = 0, line = 0;
  for (const token of tokens) {
    token.text.split("\n").forEach((part, i) => {
      if (i) [x, line] = [0, line + 1];
      const width = widthOf(part);
      if (x && x + width > WIDTH - 2 * MARGIN) {
        [x, line] = [0, line + 1];
        part = part.trimStart();
      }
      if (part) pieces.push({ text: part, x: MARGIN + x, line, width: widthOf(part), token });
      x += widthOf(part);
    });
  }
  return pieces;
}

function drawPiece(brush, { text, x, line, width, token }) {
  const y = MARGIN + line * LINE, lead = brush.measureText(text).width - brush.measureText(text.trimStart()).width;
  if (token.by === "model" && token.probability !== null) {
    const bits = -Math.log2(Math.max(token.probability, 1e-30));
    brush.fillStyle = `hsl(${TINT} / ${SHADES[Math.max(0, Math.min(5, Math.floor(bits / 2)))]})`;
    brush.fillRect(x + lead, y, width - lead, LINE - 10);
    brush.fillStyle = SOFT;
    for (let at = x; at < x + width - 1; at += 3) brush.fillRect(at, y + LINE - 10, 1.2, 1.2);
  }
  brush.fillStyle = INK;
  brush.fillText(text, x, y + SIZE);
}
