// Operations of the packages of npm. A line of JSON for each, as operations.py tells them.
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { InferenceClient } from "@huggingface/inference";
import * as ai from "ai";
import OpenAI, { toFile } from "openai";

const [server, photoPath, maskPath] = process.argv.slice(2);
const prompt = "a big red circle on a blue background at the left";
const photo = readFileSync(photoPath);
const mask = readFileSync(maskPath);
const client = new OpenAI({ baseURL: `${server}/v1`, apiKey: "none" });
const generateImage = ai.generateImage ?? ai.experimental_generateImage;
const provider = createOpenAICompatible({ name: "own", baseURL: `${server}/v1`, apiKey: "none" });

function check(is, what) {
  if (!is) throw new Error(`expected ${what}`);
}

function checkPng(bytes, width = 64, height = 64) {
  const file = Buffer.from(bytes);
  check(file.subarray(1, 4).toString() === "PNG", "a PNG");
  check(file.readUInt32BE(16) === width && file.readUInt32BE(20) === height, "its size");
}

const fromText = (text) => Buffer.from(text, "base64");
const upload = () => toFile(photo, "photo.png", { type: "image/png" });

const operations = {
  "openai (JavaScript)": {
    async models() {
      const names = [];
      for await (const model of client.models.list()) names.push(model.id);
      check(names.includes("demo:outline"), "a LoRA");
    },
    async generate() {
      const answer = await client.images.generate({ model: "demo", prompt, n: 2, size: "64x64" });
      check(answer.data.length === 2, "two images");
      for (const image of answer.data) checkPng(fromText(image.b64_json));
    },
    async LoRA() {
      const pixels = async (more) =>
        (await client.images.generate({ model: "demo", prompt, seed: 1, ...more })).data[0].b64_json;
      const named = await pixels({ model: "demo:outline" });
      check(named === (await pixels({ lora_weights: [{ name: "outline" }] })), "the same image");
      check(named !== (await pixels({})), "another image");
    },
    async stream() {
      const kinds = [];
      const body = { model: "demo", prompt, stream: true, partial_images: 2 };
      for await (const event of await client.images.generate(body)) kinds.push(event.type);
      check(
        kinds.join() ===
          "image_generation.partial_image,image_generation.partial_image,image_generation.completed",
        `other events than ${kinds}`,
      );
    },
    async edit() {
      const body = { model: "demo", prompt, image: await upload() };
      const more = { lora_weights: [{ name: "outline", scale: 0.5 }], num_inference_steps: 4 };
      const answer = await client.images.edit({ ...body, ...more });
      checkPng(fromText(answer.data[0].b64_json));
    },
    async "edit with a mask"() {
      const file = await toFile(mask, "mask.png", { type: "image/png" });
      const answer = await client.images.edit({ prompt, image: [await upload()], mask: file });
      checkPng(fromText(answer.data[0].b64_json));
    },
    async errors() {
      try {
        await client.images.generate({ model: "demo", prompt, steps: 3 });
      } catch (error) {
        check(error instanceof OpenAI.BadRequestError, "a BadRequestError");
        check(error.code === "unknown_parameter" && error.param === "steps", "code and param");
        check(error.requestID, "an id");
        return;
      }
      throw new Error("expected an error");
    },
  },
  "AI SDK (openai-compatible)": {
    async generate() {
      const model = provider.imageModel("demo");
      const { images } = await generateImage({ model, prompt, n: 2, size: "64x64" });
      check(images.length === 2, "two images");
      for (const image of images) checkPng(image.uint8Array);
    },
    async LoRA() {
      const { image } = await generateImage({ model: provider.imageModel("demo:outline"), prompt });
      checkPng(image.uint8Array);
    },
    async edit() {
      const model = provider.imageModel("demo");
      const { image } = await generateImage({ model, prompt: { text: prompt, images: [photo] } });
      checkPng(image.uint8Array);
    },
    async "edit with a mask"() {
      const model = provider.imageModel("demo");
      const { image } = await generateImage({
        model,
        prompt: { text: prompt, images: [photo], mask },
      });
      checkPng(image.uint8Array);
    },
    async errors() {
      try {
        await generateImage({ model: provider.imageModel("other"), prompt, maxRetries: 0 });
      } catch (error) {
        check(/not served here/.test(error.message), `the message, not ${error.message}`);
        return;
      }
      throw new Error("expected an error");
    },
  },
  "@huggingface/inference": {
    async generate() {
      const hf = new InferenceClient().endpoint(server);
      const parameters = { width: 64, height: 32, seed: 1, num_inference_steps: 6 };
      const image = await hf.textToImage({ inputs: prompt, parameters });
      checkPng(await image.arrayBuffer(), 64, 32);
    },
    async LoRA() {
      const hf = new InferenceClient().endpoint(`${server}/models/demo:outline`);
      checkPng(await (await hf.textToImage({ inputs: prompt })).arrayBuffer());
    },
    async edit() {
      const hf = new InferenceClient().endpoint(server);
      const inputs = new Blob([photo], { type: "image/png" });
      const image = await hf.imageToImage({ inputs, parameters: { prompt, strength: 0.6 } });
      checkPng(await image.arrayBuffer());
    },
    async errors() {
      try {
        const hf = new InferenceClient().endpoint(server);
        await hf.textToImage({ inputs: prompt, parameters: { steps: 3 } });
      } catch (error) {
        check(/num_inference_steps/.test(error.message), `the field, not ${error.message}`);
        return;
      }
      throw new Error("expected an error");
    },
  },
};

for (const [name, works] of Object.entries(operations)) {
  for (const [operation, work] of Object.entries(works)) {
    let fault = "";
    try {
      await work();
    } catch (error) {
      fault = error.stack ?? String(error);
    }
    console.log(JSON.stringify({ client: name, operation, fault }));
  }
}
