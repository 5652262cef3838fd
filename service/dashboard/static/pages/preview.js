// Rows as the trainer will see them: what is trained is marked, and what each picture becomes is told.

import { facts, h } from "../dom.js";
import { number } from "../format.js";

export function previewRows(preview) {
  return h("div.page", null,
    h("h3", null, `Rows ${number(preview.first_row)} to ${number(preview.first_row + preview.data.length - 1)} of ${number(preview.rows_total)}`),
    h("p.small", null, h("span.spans", null, h("mark", null, "Marked text")), " is what the loss is taken of; all else is context."),
    preview.data.map((row) => shownRow(row, preview)));
}

function shownRow(row, { max_length_tokens }) {
  const head = h("h3", null, h("code", null, row.row));
  if (row.problem) return h("div", null, head, h("p.notice.bad", null, row.problem));
  return h("article.item", { "aria-label": row.row }, head,
    !row.fits && h("p.notice.bad", null, `Does not fit into ${number(max_length_tokens)} tokens: the job would fail, or leave it out where you ask for that.`),
    h("div.spans", { tabindex: "0", role: "region", "aria-label": `Text of ${row.row}` }, marked(row)),
    facts([
      ["Tokens", `${number(row.total_tokens)}: ${number(row.text_tokens)} text, ${number(row.visual_tokens)} visual`], ["Trained", `${number(row.supervised_tokens)} tokens`],
    ]),
    row.images.map((image) => h("p.small", null, `${image.width} × ${image.height} pixels, seen as ${image.resized_width} × ${image.resized_height}: ${image.grid_thw.join(" × ")} patches, ${number(image.visual_tokens)} tokens. ${image.image}`)));
}

/** The text in stretches. Positions count Unicode characters, which are not JavaScript's. */
function marked(row) {
  const text = [...row.text];
  const pieces = [];
  let at = 0;
  for (const { start, end } of row.trained_spans) {
    pieces.push(text.slice(at, start).join(""), h("mark", null, text.slice(start, end).join("")));
    at = end;
  }
  return [...pieces, text.slice(at).join("")];
}
