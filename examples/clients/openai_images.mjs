// Images by the package `openai` of npm: one with a LoRA, and a stream with partial images.
import { writeFileSync } from "node:fs";
import OpenAI from "openai";

const server = process.argv[2] ?? "http://localhost:3000";
const client = new OpenAI({ baseURL: `${server}/v1`, apiKey: "none" });
const prompt = "a small yellow star on a black background in the centre";

const answer = await client.images.generate({ model: "demo:outline", prompt, seed: 7 });
writeFileSync("star.png", Buffer.from(answer.data[0].b64_json, "base64"));

const stream = await client.images.generate({
  model: "demo",
  prompt,
  stream: true,
  partial_images: 2,
});
for await (const event of stream) {
  writeFileSync(`${event.type}.png`, Buffer.from(event.b64_json, "base64"));
}
