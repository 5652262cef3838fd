// Talks to the API of this host. Keeps the user's key in this tab alone, and knows whether the service answers.

const KEY = "vlm-dft-key";
const watchers = new Set();
let lost = false;

/** An error as the API told it, or as the network did. */
export class ApiError extends Error {
  constructor(status, body, requestId) {
    super(body?.message ?? `The service answered ${status}.`);
    this.status = status;
    this.code = body?.code;
    this.param = body?.param;
    this.hint = body?.hint;
    this.requestId = requestId;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** Be told when the service stops answering, and when it answers again. */
export function onConnection(watch) {
  watchers.add(watch);
}

function connected(is) {
  if (lost !== is) return;
  lost = !is;
  for (const watch of watchers) watch(is);
}

function headers(more) {
  return key.get() ? { authorization: `Bearer ${key.get()}`, ...more } : { ...more };
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options?.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    connected(false);
    throw new ApiError(0, { message: "The service does not answer. It may be restarting; what runs goes on." });
  }
  connected(true);
  if (response.ok) return response;
  throw new ApiError(response.status, await errorBody(response), response.headers.get("x-request-id"));
}

async function errorBody(response) {
  const type = response.headers.get("content-type") ?? "";
  return type.includes("json") ? (await response.json()).error : { message: `The service answered ${response.status}.` };
}

/** path?name=value; values of a list are repeated. */
export function url(path, params = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    for (const one of [value].flat()) if (one !== null && one !== undefined && one !== "") query.append(name, one);
  }
  return query.size ? `${path}?${query}` : path;
}

export async function get(path, params, signal) {
  return (await send(url(path, params), { signal })).json();
}

export async function call(method, path, body, more) {
  const options = { method, headers: more };
  if (body !== undefined) Object.assign(options, { body: JSON.stringify(body), headers: { "content-type": "application/json", ...more } });
  return (await send(path, options)).json();
}

export const post = (path, body) => call("POST", path, body);

/** A post of one form: where no answer came, the same again makes nothing twice. */
export function submission() {
  let [sent, token] = [];
  return async (path, body) => {
    const text = path + JSON.stringify(body);
    if (text !== sent) [sent, token] = [text, crypto.getRandomValues(new Uint32Array(4)).join("-")];
    try {
      return await call("POST", path, body, { "idempotency-key": token });
    } catch (error) {
      if (error.status === 0) Object.assign(error, { title: "It may have been queued or not. ", hint: "Submit it again: however often, it is queued once." });
      throw error;
    }
  };
}

/** get, or null where this service has no such thing (404): parts of a page may be missing, not the page. */
export async function optional(path, params, signal) {
  try {
    return await get(path, params, signal);
  } catch (error) {
    if (error.status === 404 || error.status === 405) return null;
    throw error;
  }
}

/** Every page of a list. */
export async function all(path, params, signal) {
  const rows = [];
  for (let after; ; ) {
    const page = await get(path, { limit: 100, ...params, after }, signal);
    rows.push(...page.data);
    if (!page.has_more || !page.last_id) return rows;
    after = page.last_id;
  }
}

/** The bytes of something that needs the key. */
export async function content(path, signal) {
  return (await send(path, { signal })).blob();
}

/** A picture that needs the key, as an address for <img>; the caller revokes it. */
export async function picture(path, signal) {
  return URL.createObjectURL(await content(path, signal));
}

/** A file of the API, saved by the browser. */
export async function download(path, name) {
  const address = await picture(path);
  const link = Object.assign(document.createElement("a"), { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** Upload with progress, which fetch cannot tell: told(share 0..1) is called on the way. */
export function upload(path, fields, file, told, signal) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  form.append("file", file, file.name);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.responseType = "json";
    request.upload.onprogress = (event) => event.lengthComputable && told(event.loaded / event.total);
    request.onerror = () => reject(new ApiError(0, { message: "The upload broke off: the service does not answer." }));
    request.onabort = () => reject(new DOMException("aborted", "AbortError"));
    request.onload = () => {
      if (request.status < 300) resolve(request.response);
      else reject(new ApiError(request.status, request.response?.error, request.getResponseHeader("x-request-id")));
    };
    signal?.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

/** Server-sent events, read with fetch because EventSource cannot send a key. Ends when the stream does. */
export async function* events(path, signal) {
  const response = await send(path, { signal, headers: { accept: "text/event-stream" } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = parsed(block);
      if (event.data) yield { name: event.event ?? "message", data: JSON.parse(event.data) };
    }
  }
}

function parsed(block) {
  const fields = {};
  for (const line of block.split("\n")) {
    const [, name, value] = /^([a-z]+): ?(.*)$/.exec(line) ?? [];
    if (name) fields[name] = name === "data" && fields.data ? `${fields.data}\n${value}` : value;
  }
  return fields;
}
