// Webhooks: who is told of the ends of jobs, what was sent to whom, and sending it again.

import { all, call, get, post } from "../api.js";
import { empty, h, phase, section, show, table } from "../dom.js";
import { boxes, choice, field } from "../form.js";
import { number, time } from "../format.js";

const PATH = "/v1/webhook_endpoints";

export async function render(root, page) {
  page.title("Webhooks");
  const rows = h("div");
  const types = (await get("/v1/webhook_event_types", {}, page.signal)).data;
  const load = async () => {
    const endpoints = await all(PATH, {}, page.signal);
    show(rows, endpoints.length ? endpointTable(endpoints) : empty("No endpoint yet", h("p", null, "Your server is told when a job ends, signed as OpenAI signs: no need to poll.")));
  };
  await load();
  root.replaceChildren(h("div.head", null, h("h1", null, "Webhooks")), section("Endpoints of this project", null, rows), creation(page, types, load));
  page.every(5, load);
}

function endpointTable(endpoints) {
  return table("Webhook endpoints, newest first", [
    ["Name", (each) => h("a", { href: `#/webhooks/${each.id}` }, each.name)],
    ["URL", (each) => h("code", null, each.url), "text"],
    ["Events", (each) => each.event_types.map((type) => h("div", null, type))],
    ["Secret", (each) => h("code", null, each.signing_secret_hint)],
    ["Made", (each) => time(each.created_at)],
  ], endpoints);
}

function creation(page, types, load) {
  const name = h("input", { id: "webhook-name", required: true, maxlength: "255" });
  const url = h("input", { id: "webhook-url", type: "url", required: true, maxlength: "2048", placeholder: "https://…" });
  const events = boxes("Events", "event", types, types.filter((type) => type.startsWith("fine_tuning")));
  const out = h("div", { "aria-live": "polite" });
  const submit = (event) => {
    event.preventDefault();
    page.ask(out, async () => {
      const made = await post(PATH, { name: name.value, url: url.value, event_types: events.chosen() });
      await load();
      event.target.reset();
      show(out, secretOf(made));
    });
  };
  return section("New endpoint", null, h("form.page", { onsubmit: submit },
    field("Name", name), field("URL", url, "https, on a public address."), events.element,
    h("p", null, h("button.primary", { type: "submit" }, "Make it")), out));
}

function secretOf(endpoint) {
  return h("div.notice.good", { role: "alert" },
    h("p", null, h("strong", null, `The signing secret of ${endpoint.name}. `), "It is shown this once; give it to openai.webhooks.unwrap:"), h("code", null, endpoint.signing_secret));
}

/** One endpoint: trying it, its deliveries, its secret, its end. */
export async function renderOne(root, page, id) {
  const path = `${PATH}/${encodeURIComponent(id)}`;
  const endpoint = await get(path, {}, page.signal);
  page.title(endpoint.name);
  const sample = choice("sample", endpoint.event_types);
  const out = h("div", { "aria-live": "polite" });
  const rows = h("div");
  const load = async () => {
    const deliveries = (await get(`${path}/deliveries`, { limit: 50 }, page.signal)).data;
    show(rows, deliveries.length ? deliveryTable(deliveries, replay) : empty("Nothing was sent yet", h("p", null, "The end of the next job is.")));
  };
  const replay = (delivery) => page.ask(out, async () => { await post(`${path}/deliveries/${delivery.id}/replay`); await load(); });
  const test = () => page.ask(out, async () => {
    const { status_code: status } = await post(`${path}/test`, { event_type: sample.value });
    show(out, h(`p.notice.${status < 300 ? "good" : "warn"}`, null, `The endpoint answered with status ${status}.`));
  });
  const rotate = () => confirm("Make a new secret? The old one signs beside it for 24 hours, then ends.")
    && page.ask(out, async () => show(out, secretOf(await post(`${path}/rotate_secret`, { keep_old_secret_active_for_24_hours: true }))));
  const remove = () => confirm(`Delete ${endpoint.name}? What waits for it is never sent.`)
    && page.ask(out, async () => { await call("DELETE", path); location.hash = "#/webhooks"; });
  await load();
  root.replaceChildren(
    h("div.head", null, h("h1", null, endpoint.name), h("div.actions", null,
      h("button", { type: "button", onclick: rotate }, "New secret"), h("button.danger", { type: "button", onclick: remove }, "Delete"))),
    section("Try it", null, h("p", null, h("code", null, endpoint.url)),
      h("div.filter", null, h("label", { for: "sample" }, "Sample"), sample, h("button", { type: "button", onclick: test }, "Send it now")), out),
    section("Deliveries", null, rows));
  page.every(3, load);
}

function deliveryTable(deliveries, replay) {
  return table("Deliveries, newest first", [
    ["Event", (each) => each.event_type],
    ["State", (each) => phase(each.status)],
    ["Attempts", (each) => number(each.attempts), "right"],
    ["Answer", (each) => each.error ?? each.status_code ?? "–", "text"],
    ["Created", (each) => time(each.created_at)],
    ["Next attempt", (each) => time(each.next_attempt_at)],
    ["", (each) => h("button", { type: "button", onclick: () => replay(each), "aria-label": `Send ${each.event_type} of ${time(each.created_at)} again` }, "Send again")],
  ], deliveries);
}
