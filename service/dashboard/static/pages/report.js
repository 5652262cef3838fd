// What validation found in a file: numbers, and the rows that cannot be trained on with their text and pictures.

import { facts, h, table, tile } from "../dom.js";
import { number } from "../format.js";
import { openSource } from "../source.js";

export function validationReport(file, page) {
  const report = file.validation_report;
  const refused = file.status === "error";
  const verdict = h(`div.notice.${refused ? "bad" : report?.invalid ? "warn" : "good"}`, { role: "status", id: "verdict" },
    h("p", null, h("strong", null, refused ? "This file cannot be trained on. " : report?.invalid ? "Usable, without its invalid rows. " : "Every row can be trained on. "), file.status_details ?? ""),
    refused && h("p", null, "Correct what is listed, then upload it again."));
  if (!report) return h("div", null, verdict);
  return h("div.page", null, verdict,
    h("div.tiles", null,
      tile("Rows", number(report.rows), report.format), tile("Valid", number(report.valid)), tile("Invalid", number(report.invalid)),
      tile("Pictures", number(report.images)), tile("Duplicates", number(report.duplicates), "kept"), tile("Too long", number(report.overlong), `above ${number(report.max_length_tokens)} tokens`)),
    report.problems.length > 0 && problems("Rows that are invalid", report.problems, report.invalid, file, page),
    report.overlong_rows.length > 0 && problems("Rows that are too long", report.overlong_rows, report.overlong, file, page),
    report.tokens && h("details", null, h("summary", null, "Tokens"), tokens(report.tokens)));
}

function problems(title, rows, count, file, page) {
  const shown = rows.length < count ? `${title}: the first ${number(rows.length)} of ${number(count)}` : `${title}: ${number(count)}`;
  return h("div", null, h("h3", null, shown), table(title, [
    ["Where", (row) => h("code", null, row.line ? `${row.file}:${row.line}` : row.file)],
    ["Field", (row) => h("code", null, row.field || "–")],
    ["What is wrong", (row) => row.reason, "text"],
    ["Row", (row) => (row.line && !file.registered ? look(row, file, page) : "–"), "wide"],
  ], rows));
}

/** The row itself, read from the uploaded file when somebody asks. */
function look(problem, file, page) {
  const inside = h("div");
  const part = h("details", null, h("summary", null, "Show the row"), inside);
  part.addEventListener("toggle", async () => {
    if (!part.open || inside.childElementCount) return;
    inside.replaceChildren(h("p.loading", null, "Reading the file…"));
    try {
      const source = await openSource(file, page.signal);
      const row = await source.row(problem.file, problem.line);
      inside.replaceChildren(h("pre", { tabindex: "0", "aria-label": `${problem.file}:${problem.line}` }, row.text), h("div.pictures", null, row.pictures.map((picture) => shownPicture(picture, page))));
    } catch (error) {
      if (!page.signal.aborted) inside.replaceChildren(h("p.notice.bad", null, error.message));
    }
  });
  return part;
}

function shownPicture({ path, bytes }, page) {
  if (!bytes) return h("p.notice.bad", null, `${path}: not in the file`);
  const address = URL.createObjectURL(new Blob([bytes]));
  page.signal.addEventListener("abort", () => URL.revokeObjectURL(address));
  const image = h("img", { src: address, alt: `Picture ${path}` });
  image.addEventListener("error", () => image.replaceWith(h("p.notice.bad", null, `${path}: this is no picture that a browser can show`)));
  return h("figure", null, image, h("figcaption.small", null, path));
}

function tokens(statistics) {
  const rows = ["text", "visual", "supervised", "total"].map((name) => ({ name, ...statistics[name] }));
  return h("div", null,
    facts([["Tokenizer", statistics.tokenizer], ["Pictures have", `${number(statistics.min_pixels)} to ${number(statistics.max_pixels)} pixels`]]),
    table("Tokens of a row", [
      ["Tokens", (row) => row.name],
      ["Least", (row) => number(row.min), "right"], ["Half have at most", (row) => number(row.p50), "right"],
      ["95 % have at most", (row) => number(row.p95), "right"], ["Most", (row) => number(row.max), "right"], ["All rows", (row) => number(row.total), "right"],
    ], rows));
}
