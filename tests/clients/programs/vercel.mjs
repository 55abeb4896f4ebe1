// The calls of the Vercel AI SDK: node vercel.mjs URL [CALL...]
import { readFile } from "node:fs/promises";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage, generateText, streamText } from "ai";
import { CHAT_MODEL, OPENAIS_MODEL, PROMPT, report } from "./report.mjs";

const baseURL = process.argv[2];
const image = "image.png";
globalThis.AI_SDK_LOG_WARNINGS = false;
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "demo", baseURL, apiKey: "none" });
const quick = { maxRetries: 0 };

async function generate(model, prompt = PROMPT) {
  const { images } = await generateImage({ model, prompt, size: "64x64", ...quick });
  return images.map((one) => one.uint8Array);
}

function asked(model, options, messages) {
  const tools = { image_generation: openai.tools.imageGeneration(options) };
  const prompt = messages ? { messages } : { prompt: PROMPT };
  return { model: openai.responses(model), tools, ...prompt, ...quick };
}

async function respond(model, options, messages) {
  const { staticToolResults } = await generateText(asked(model, options, messages));
  return staticToolResults.map((one) => one.output.result);
}

async function respondInAStream() {
  const found = [];
  for await (const part of streamText({
    ...asked("demo", { partialImages: 1 }),
    onError: () => {},
  }).fullStream) {
    if (part.type === "error") throw part.error;
    if (part.type === "tool-result") found.push(part.output.result);
  }
  return found;
}

const message = async () => [
  {
    role: "user",
    content: [
      { type: "text", text: PROMPT },
      { type: "image", image: await readFile(image), mediaType: "image/png" },
    ],
  },
];

await report({
  generate: () => generate(openai.image("demo")),
  "generate, OpenAI's model": () => generate(openai.image(OPENAIS_MODEL)),
  "generate, openai-compatible": () => generate(compatible.imageModel("demo")),
  edit: async () =>
    generate(openai.image("demo"), { text: PROMPT, images: [await readFile(image)] }),
  "edit of two images": async () => {
    const file = await readFile(image);
    return generate(openai.image("demo"), { text: PROMPT, images: [file, file] });
  },
  Responses: () => respond("demo"),
  "Responses, OpenAI's model": () => respond(CHAT_MODEL, { model: OPENAIS_MODEL }),
  "Responses, stream": respondInAStream,
  "Responses, edit": async () => respond("demo", {}, await message()),
});
