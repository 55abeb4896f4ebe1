// The calls of OpenAI's client for Node.js: node openai_node.mjs URL [CALL...]
import { readFile } from "node:fs/promises";
import OpenAI, { toFile } from "openai";
import { CHAT_MODEL, OPENAIS_MODEL, PROMPT, fetched, report } from "./report.mjs";

const baseURL = process.argv[2];
const [image, mask] = ["image.png", "mask.png"];
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const file = async (path) => toFile(await readFile(path), "image.png", { type: "image/png" });
const tool = (options) => ({ type: "image_generation", ...options });

async function generate(options) {
  const answer = await client.images.generate({ model: "demo", prompt: PROMPT, ...options });
  return Promise.all(answer.data.map(fetched));
}

async function stream() {
  const found = [];
  const options = { model: "demo", prompt: PROMPT, stream: true, partial_images: 1 };
  for await (const event of await client.images.generate(options)) {
    found.push(event.b64_json);
  }
  return found;
}

async function edit(number, options) {
  const images = await Promise.all(Array(number).fill(image).map(file));
  const answer = await client.images.edit({
    model: "demo",
    prompt: PROMPT,
    image: number === 1 ? images[0] : images,
    ...options,
  });
  return answer.data.map((one) => one.b64_json);
}

async function respond(model, options) {
  const answer = await client.responses.create({ model, input: PROMPT, tools: [tool(options)] });
  return answer.output.map((call) => call.result);
}

async function respondInAStream() {
  const found = [];
  const options = { model: "demo", input: PROMPT, tools: [tool({ partial_images: 1 })] };
  const events = client.responses.stream(options);
  for await (const event of events) {
    if (event.type === "response.image_generation_call.partial_image") {
      found.push(event.partial_image_b64);
    }
  }
  return [...found, (await events.finalResponse()).output[0].result];
}

async function respondWithAnEdit() {
  const url = `data:image/png;base64,${await readFile(image, "base64")}`;
  const answer = await client.responses.create({
    model: "demo",
    input: [
      {
        role: "user",
        content: [
          { type: "input_text", text: PROMPT },
          { type: "input_image", image_url: url, detail: "auto" },
        ],
      },
    ],
    tools: [tool()],
  });
  return [answer.output[0].result];
}

async function vary() {
  const answer = await client.images.createVariation({ image: await file(image) });
  return answer.data.map((one) => one.b64_json);
}

await report({
  generate: () => generate(),
  "generate, OpenAI's model": () => generate({ model: OPENAIS_MODEL }),
  "generate, as a URL": () => generate({ response_format: "url" }),
  "generate, stream": stream,
  edit: () => edit(1),
  "edit, with a mask": async () => edit(1, { mask: await file(mask) }),
  "edit of two images": () => edit(2),
  variation: vary,
  Responses: () => respond("demo"),
  "Responses, OpenAI's model": () => respond(CHAT_MODEL, { model: OPENAIS_MODEL }),
  "Responses, stream": respondInAStream,
  "Responses, edit": respondWithAnEdit,
});
