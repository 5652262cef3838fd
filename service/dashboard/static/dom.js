// Makes elements. Text is always text: nothing here or elsewhere parses HTML that came from data.

const SVG = "http://www.w3.org/2000/svg";

/** An element: h("a.quiet", { href, onclick }, "text", child, [children]). Null and false children are left out. */
export function h(spec, attributes, ...children) {
  const [tag, ...classes] = spec.split(".");
  return fill(document.createElement(tag || "div"), classes, attributes, children);
}

/** The same for SVG. */
export function svg(spec, attributes, ...children) {
  const [tag, ...classes] = spec.split(".");
  return fill(document.createElementNS(SVG, tag), classes, attributes, children);
}

function fill(element, classes, attributes, children) {
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...flat(children));
  return element;
}

function flat(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

const FOCUSABLE = "a, button, input, select, summary, [tabindex]";

/** Show these children in the element, unless it shows them already. The focus stays where it is, and what is open, open. */
export function show(element, ...children) {
  const fresh = h("div", null, children);
  if (markup(element) === markup(fresh)) return;
  const active = document.activeElement;
  const focused = element !== active && element.contains(active) ? said(active) : null;
  const open = [...element.querySelectorAll("details[open] > summary")].map(said);
  element.replaceChildren(...fresh.childNodes);
  for (const summary of element.querySelectorAll("details > summary")) summary.parentElement.open ||= open.includes(said(summary));
  if (focused) [...element.querySelectorAll(FOCUSABLE)].find((each) => said(each) === focused)?.focus({ preventScroll: true });
}

/** What is shown, whichever parts of it somebody has opened. */
function markup(element) {
  return element.innerHTML.replaceAll(' open=""', "");
}

/** What tells an element from its neighbours after they were made anew. */
function said(element) {
  return `${element.tagName} ${element.id || element.getAttribute("href") || element.getAttribute("aria-label") || element.textContent}`;
}

/** A heading of a part of a page, with what belongs to its right. */
export function section(title, attributes, ...children) {
  const id = `s-${title.toLowerCase().replaceAll(/[^a-z0-9]+/g, "-")}`;
  return h("section.card", { "aria-labelledby": id, ...attributes }, h("h2", { id }, title), ...children);
}

/** A table; columns are [title, cell(row), class?]. On a phone each row becomes a card, so cells carry their titles. */
export function table(label, columns, rows) {
  const head = h("tr", null, columns.map(([title, , kind]) => h("th", { scope: "col", class: kind }, title)));
  const body = rows.map((row) =>
    h("tr", null, columns.map(([title, cell, kind]) => h("td", { "data-title": title, class: kind }, one(cell(row))))),
  );
  return h("div.scroll", { role: "group", "aria-label": label, tabindex: "0" },
    h("table", null, h("caption.unseen", null, label), h("thead", null, head), h("tbody", null, body)));
}

/** Several things in a cell stay below each other where cells are flexible boxes. */
function one(content) {
  return Array.isArray(content) ? h("div", null, content) : content;
}

/** Pairs of a name and what it is. */
export function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h("dl.facts", null, known.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));
}

/** What stands where there is nothing yet: why, and what to do. */
export function empty(title, ...children) {
  return h("div.empty", null, h("p.title", null, title), ...children);
}

/** A bar of progress; percent is null while nobody knows. */
export function progress(percent, label) {
  return h("progress", { max: "100", value: percent === null ? undefined : String(percent), "aria-label": label });
}

/** A number with its name, as the top of a page has it. */
export function tile(name, value, note) {
  return h("div.tile", null, h("span.name", null, name), h(String(value).length > 24 ? "code.value" : "span.value", null, value), note && h("span.note", null, note));
}

/** Where a job is, as a word in its colour. */
export function phase(name) {
  return h(`span.phase.${name}`, null, name.replaceAll("_", " "));
}

/** A message that something went wrong, with what the API said. */
export function failure(error, { title = "This did not work. ", retry } = {}) {
  return h("div.notice.bad", { role: "alert" },
    h("p", null, h("strong", null, error.title ?? title), error.message),
    error.hint && h("p", null, error.hint),
    error.requestId && h("p.small", null, `Request ${error.requestId}`),
    retry && h("button", { type: "button", onclick: retry }, "Try again"));
}
