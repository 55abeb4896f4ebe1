// What a client's program prints: the outcome of each of its calls, as JSON. See report.py.

export const PROMPT = "a red circle on a blue background";
export const OPENAIS_MODEL = "gpt-image-1";
export const CHAT_MODEL = "gpt-5-mini";

export async function report(calls) {
  const outcomes = {};
  const names = process.argv.slice(3);
  for (const name of names.length ? names : Object.keys(calls)) {
    try {
      outcomes[name] = { images: (await calls[name]()).map(sizeOf) };
    } catch (error) {
      const cause = error.lastError ?? error;
      const status = cause.status ?? cause.statusCode ?? null;
      const message = `${cause.name}: ${cause.message}`.slice(0, 1000);
      outcomes[name] = { status, message };
    }
  }
  process.stdout.write(JSON.stringify(outcomes));
}

// The size of a PNG file in base64 or as bytes.
function sizeOf(image) {
  const file = typeof image === "string" ? Buffer.from(image, "base64") : Buffer.from(image);
  if (file.toString("latin1", 1, 4) !== "PNG") {
    throw new Error(`no PNG file: ${file.toString("latin1", 0, 20)}`);
  }
  return [file.readUInt32BE(16), file.readUInt32BE(20)];
}

export async function fetched(image) {
  return image.b64_json ?? new Uint8Array(await (await fetch(image.url)).arrayBuffer());
}
