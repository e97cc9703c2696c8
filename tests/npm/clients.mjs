// The calls that people make through the openai and @anthropic-ai/sdk packages, against a daemon at
// TRIOSWAP_URL.  One line of JSON for each, with what the model said or what went wrong; whether that
// is right is for npm_check.py to judge.

import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI, { toFile } from "openai";

const url = process.env.TRIOSWAP_URL;
const apiKey = process.env.TRIOSWAP_API_KEY;
const models = JSON.parse(process.env.MODELS);
const once = { maxRetries: 0, timeout: 60_000 };
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey, ...once });
const anthropic = new Anthropic({ baseURL: url, apiKey, ...once });

const messages = [{ role: "user", content: "say something" }];
const schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const chatTools = [{ type: "function", function: { name: "weather", parameters: schema } }];
const responseTools = [{ type: "function", name: "weather", parameters: schema, strict: false }];
const asked = { messages, max_tokens: 8 };
const messageTools = [{ name: "weather", input_schema: schema }];
const sound = () => toFile(Buffer.alloc(1_500_000), "a.wav", { type: "audio/wav" });
const picture = (name) => toFile(Buffer.alloc(1000), name, { type: "image/png" });
const named = (base64) => Buffer.from(base64, "base64").toString();

async function all(stream) {
  const events = [];
  for await (const event of await stream) events.push(event);
  return events;
}

// The word of which a stream consists.
function oneWord(text) {
  const words = text.trim().split(/\s+/);
  assert.equal(words.length, 3);
  assert.equal(new Set(words).size, 1);
  return words[0];
}

// The model in the call of a tool.
function ofTool(name, given) {
  assert.deepEqual(typeof given === "string" ? JSON.parse(given) : given, { city: "Rome" });
  return name.replace("weather_of_", "");
}

const calls = {
  async openai_chat(model) {
    const done = await openai.chat.completions.create({ model, messages });
    assert.equal(done.choices[0].finish_reason, "stop");
    return done.choices[0].message.content;
  },
  async openai_chat_stream(model) {
    const chunks = await all(
      openai.chat.completions.create({ model, messages, stream: true, stream_options: { include_usage: true } }),
    );
    assert.equal(chunks.at(-1).usage.total_tokens, 4);
    return oneWord(chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.delta.content ?? "")).join(""));
  },
  async openai_chat_helper(model) {
    const done = await openai.chat.completions.stream({ model, messages }).finalChatCompletion();
    assert.equal(done.choices[0].message.role, "assistant");
    return oneWord(done.choices[0].message.content);
  },
  async openai_tools(model) {
    const done = await openai.chat.completions.create({ model, messages, tools: chatTools });
    const called = done.choices[0].message.tool_calls[0].function;
    return ofTool(called.name, called.arguments);
  },
  async openai_tools_helper(model) {
    const done = await openai.chat.completions.stream({ model, messages, tools: chatTools }).finalChatCompletion();
    const called = done.choices[0].message.tool_calls[0].function;
    return ofTool(called.name, called.arguments);
  },
  async openai_completions(model) {
    return (await openai.completions.create({ model, prompt: "go" })).choices[0].text;
  },
  async openai_completions_stream(model) {
    const chunks = await all(openai.completions.create({ model, prompt: "go", stream: true }));
    return oneWord(chunks.map((chunk) => chunk.choices[0].text).join(""));
  },
  async openai_responses(model) {
    return (await openai.responses.create({ model, input: "go" })).output_text;
  },
  async openai_responses_stream(model) {
    const events = await all(openai.responses.create({ model, input: "go", stream: true }));
    assert.equal(events[0].type, "response.created");
    assert.equal(events.at(-1).type, "response.completed");
    const deltas = events.filter((event) => event.type === "response.output_text.delta");
    return oneWord(deltas.map((event) => event.delta).join(""));
  },
  async openai_responses_helper(model) {
    return oneWord((await openai.responses.stream({ model, input: "go" }).finalResponse()).output_text);
  },
  async openai_responses_tools(model) {
    const [called] = (await openai.responses.create({ model, input: "go", tools: responseTools })).output;
    return ofTool(called.name, called.arguments);
  },
  async openai_responses_tools_helper(model) {
    const stream = openai.responses.stream({ model, input: "go", tools: responseTools });
    const [called] = (await stream.finalResponse()).output;
    return ofTool(called.name, called.arguments);
  },
  async openai_embeddings(model) {
    const done = await openai.embeddings.create({ model, input: ["one", "two"] });
    assert.deepEqual(done.data.map((row) => Array.from(row.embedding)), [[0.25, -0.5], [0.25, -0.5]]);
    return done.model;
  },
  async openai_embeddings_float(model) {
    const done = await openai.embeddings.create({ model, input: "one", encoding_format: "float" });
    assert.deepEqual(done.data[0].embedding, [0.25, -0.5]);
    return done.model;
  },
  async openai_transcription(model) {
    return (await openai.audio.transcriptions.create({ model, file: await sound() })).text;
  },
  async openai_transcription_stream(model) {
    const events = await all(openai.audio.transcriptions.create({ model, file: await sound(), stream: true }));
    assert.equal(events.at(-1).type, "transcript.text.done");
    return oneWord(events.at(-1).text);
  },
  async openai_translation(model) {
    return (await openai.audio.translations.create({ model, file: await sound() })).text;
  },
  async openai_speech(model) {
    const answer = await openai.audio.speech.create({ model, voice: "alloy", input: "hello" });
    return Buffer.from(await answer.arrayBuffer()).subarray(2).toString();
  },
  async openai_image(model) {
    const done = await openai.images.generate({ model, prompt: "a cat", n: 2 });
    assert.equal(done.data.length, 2);
    return named(done.data[0].b64_json);
  },
  async openai_image_stream(model) {
    const events = await all(openai.images.generate({ model, prompt: "a cat", stream: true, partial_images: 1 }));
    assert.equal(events.at(-1).type, "image_generation.completed");
    return named(events.at(-1).b64_json);
  },
  async openai_image_edit(model) {
    const image = [await picture("1.png"), await picture("2.png")];
    return named((await openai.images.edit({ model, image, prompt: "a dog" })).data[0].b64_json);
  },
  async openai_image_edit_stream(model) {
    const image = await picture("1.png");
    const events = await all(openai.images.edit({ model, image, prompt: "a dog", stream: true }));
    assert.equal(events.at(-1).type, "image_edit.completed");
    return named(events.at(-1).b64_json);
  },
  async openai_image_variation(model) {
    return named((await openai.images.createVariation({ model, image: await picture("1.png") })).data[0].b64_json);
  },
  async openai_rerank(model) {
    const done = await openai.post("/rerank", { body: { model, query: "q", documents: ["one", "two"] } });
    assert.deepEqual(done.results.map((row) => row.index), [0, 1]);
    return done.model;
  },
  async anthropic_messages(model) {
    const done = await anthropic.messages.create({ model, ...asked });
    assert.equal(done.stop_reason, "end_turn");
    return done.content[0].text;
  },
  async anthropic_stream(model) {
    const events = await all(anthropic.messages.create({ model, ...asked, stream: true }));
    assert.equal(events[0].type, "message_start");
    assert.equal(events.at(-1).type, "message_stop");
    const deltas = events.filter((event) => event.type === "content_block_delta");
    return oneWord(deltas.map((event) => event.delta.text).join(""));
  },
  async anthropic_helper(model) {
    return oneWord((await anthropic.messages.stream({ model, ...asked }).finalMessage()).content[0].text);
  },
  async anthropic_tools(model) {
    const done = await anthropic.messages.create({ model, ...asked, tools: messageTools });
    return ofTool(done.content[1].name, done.content[1].input);
  },
  async anthropic_tools_helper(model) {
    const stream = anthropic.messages.stream({ model, ...asked, tools: messageTools });
    const called = (await stream.finalMessage()).content[1];
    return ofTool(called.name, called.input);
  },
  async anthropic_beta(model) {
    return (await anthropic.beta.messages.create({ model, ...asked })).content[0].text;
  },
  async anthropic_count_tokens(model) {
    assert.equal((await anthropic.messages.countTokens({ model, messages })).input_tokens, 1);
    return model; // the answer has no other words
  },
};

// What must fail, with the class that must be thrown.
const guessing = { apiKey: "sk-guessed", ...once };
const failures = {
  openai_unknown_model: [OpenAI.NotFoundError, () => openai.chat.completions.create({ model: "nobody", messages })],
  openai_failed_start: [
    OpenAI.InternalServerError,
    () => openai.chat.completions.create({ model: "fails", messages }),
  ],
  openai_failed_start_in_stream: [
    OpenAI.APIError,
    () => all(openai.chat.completions.create({ model: "fails", messages, stream: true })),
  ],
  openai_failed_start_in_responses: [
    OpenAI.APIError,
    () => all(openai.responses.create({ model: "fails", input: "go", stream: true })),
  ],
  openai_wrong_key: [
    OpenAI.AuthenticationError,
    () => new OpenAI({ baseURL: `${url}/v1`, ...guessing }).models.list(),
  ],
  anthropic_unknown_model: [Anthropic.NotFoundError, () => anthropic.messages.create({ model: "nobody", ...asked })],
  anthropic_failed_start: [
    Anthropic.InternalServerError,
    () => anthropic.messages.create({ model: "fails", ...asked }),
  ],
  anthropic_failed_start_in_stream: [
    Anthropic.APIError,
    () => all(anthropic.messages.create({ model: "fails", ...asked, stream: true })),
  ],
  anthropic_wrong_key: [
    Anthropic.AuthenticationError,
    () => new Anthropic({ baseURL: url, ...guessing }).messages.create({ model: "nobody", ...asked }),
  ],
};

function tell(line) {
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

async function unload() {
  const answer = await fetch(`${url}/api/models/unload`, { method: "POST", headers: { "x-api-key": apiKey } });
  assert.equal(answer.status, 200);
}

for (const [call, ask] of Object.entries(calls)) {
  await unload();
  for (const model of models) {
    tell({ call, model, ...(await ask(model).then((said) => ({ said }), (error) => ({ error: String(error) }))) });
  }
}
const listed = await openai.models.list();
tell({ call: "openai_models", models: listed.data.map((row) => row.id).sort() });
const listedToo = await all(anthropic.models.list());
tell({ call: "anthropic_models", models: listedToo.map((row) => row.id).sort() });
for (const [call, [kind, ask]] of Object.entries(failures)) {
  const thrown = await ask().then(() => null, (error) => error);
  tell({ call, kind: kind.name, thrown: thrown?.constructor.name, right: thrown instanceof kind, error: String(thrown) });
}
