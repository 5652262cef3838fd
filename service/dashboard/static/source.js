// Reads rows and pictures out of an uploaded file, here in the browser: .jsonl, .tar, .tar.gz or .zip.

import { ApiError, content } from "./api.js";
import { bytes as asBytes } from "./format.js";

const MOST_BYTES = 64 * 2 ** 20;
const PICTURE = /\.(png|jpe?g|webp|gif|bmp)$/i;
let opened = { id: null, source: null };

/** The file's rows: (await openSource(file)).row(name, line) gives { text, pictures: [{ path, bytes }] }. */
export async function openSource(file, signal) {
  if (opened.id === file.id) return opened.source;
  if (file.bytes > MOST_BYTES) throw new ApiError(0, { message: `The file has ${asBytes(file.bytes)}: look into it on your own machine; the place of the row is named here.` });
  const whole = await content(`/v1/files/${encodeURIComponent(file.id)}/content`, signal);
  const members = await unpack(new Uint8Array(await whole.arrayBuffer()), file.filename);
  opened = { id: file.id, source: new Source(members) };
  return opened.source;
}

class Source {
  constructor(members) {
    this.members = members;
  }

  async row(name, line) {
    const member = find(this.members, name);
    if (!member) throw new ApiError(0, { message: `${name} is not in the file.` });
    const text = await lineOf(await member(), name, line);
    const paths = [...text.matchAll(/"((?:[^"\\]|\\.)*)"/g)].map(([, value]) => value).filter((value) => PICTURE.test(value));
    const pictures = [...new Set(paths)].map(async (path) => ({ path, bytes: await find(this.members, path)?.() }));
    return { text, pictures: await Promise.all(pictures) };
  }
}

/** By its path, or by the end of it: archives often have a folder around everything. */
function find(members, name) {
  const wanted = name.replace(/^\.?\//, "");
  const path = members.has(wanted) ? wanted : [...members.keys()].find((each) => each.endsWith(`/${wanted}`));
  return members.get(path);
}

async function lineOf(content, name, number) {
  const text = new TextDecoder().decode(content);
  if (!/^\s*\[/.test(text)) return pretty(text.split("\n")[number - 1] ?? "");
  try {
    return JSON.stringify(JSON.parse(text)[number - 1], null, 2);
  } catch {
    throw new ApiError(0, { message: `${name} is one JSON array that cannot be read as a whole; element ${number} is meant.` });
  }
}

/** Indented where it is JSON at all; as it stands where that is what is wrong with it. */
function pretty(line) {
  try {
    return JSON.stringify(JSON.parse(line), null, 2);
  } catch {
    return line;
  }
}

/** Path -> () => bytes of everything in the file. */
async function unpack(data, name) {
  if (data[0] === 0x1f && data[1] === 0x8b) return unpack(await inflated(data, "gzip"), name.replace(/\.t?gz$/, ""));
  if (data[0] === 0x50 && data[1] === 0x4b) return zipMembers(data);
  if (ascii(data, 257, 5) === "ustar") return tarMembers(data);
  return new Map([[name, async () => data]]);
}

async function inflated(data, format) {
  const reader = new Blob([data]).stream().pipeThrough(new DecompressionStream(format)).getReader();
  const chunks = [];
  for (let size = 0; ; ) {
    const { value, done } = await reader.read();
    if (done) break;
    size += value.length;
    if (size > 8 * MOST_BYTES) throw new ApiError(0, { message: "Unpacked, the file is too large to look into here." });
    chunks.push(value);
  }
  return new Uint8Array(await new Blob(chunks).arrayBuffer());
}

function ascii(data, start, length) {
  return new TextDecoder().decode(data.subarray(start, start + length)).replace(/\0.*$/s, "");
}

function tarMembers(data) {
  const members = new Map();
  let longName = null;
  for (let at = 0; at + 512 <= data.length && data[at]; ) {
    const size = parseInt(ascii(data, at + 124, 12).trim() || "0", 8);
    const type = String.fromCharCode(data[at + 156] || 48);
    const content = data.subarray(at + 512, at + 512 + size);
    const prefix = ascii(data, at + 257, 6) === "ustar" ? ascii(data, at + 345, 155) : "";
    const name = longName ?? (prefix ? `${prefix}/` : "") + ascii(data, at, 100);
    longName = type === "L" ? ascii(content, 0, size) : type === "x" ? paxName(content) : null;
    if (type === "0") members.set(name.replace(/^\.\//, ""), async () => content);
    at += 512 + Math.ceil(size / 512) * 512;
  }
  return members;
}

function paxName(content) {
  return /^\d+ path=(.*)$/m.exec(new TextDecoder().decode(content))?.[1] ?? null;
}

function zipMembers(data) {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  let end = data.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end -= 1;
  const members = new Map();
  if (end < 0) return members;
  let at = view.getUint32(end + 16, true);
  for (let count = view.getUint16(end + 10, true); count > 0; count -= 1) {
    const [method, size] = [view.getUint16(at + 10, true), view.getUint32(at + 20, true)];
    const [nameLength, extra, comment] = [28, 30, 32].map((offset) => view.getUint16(at + offset, true));
    const local = view.getUint32(at + 42, true);
    members.set(ascii(data, at + 46, nameLength), async () => {
      const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
      const packed = data.subarray(start, start + size);
      return method === 0 ? packed : inflated(packed, "deflate-raw");
    });
    at += 46 + nameLength + extra + comment;
  }
  return members;
}
