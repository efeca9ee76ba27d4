// OpenAI's JavaScript SDK against URL with KEY; what came back goes to stdout as one JSON object.

import OpenAI from "openai";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const messages = [{ role: "user", content: "hello there" }];
const asked = { model: "chat", messages, max_tokens: 16, temperature: 0 };
const told = {};

told.chat = (await client.chat.completions.create(asked)).choices[0].message.content;

told.stream = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  told.stream += chunk.choices[0]?.delta?.content ?? "";
}

const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Oslo", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const tool = { type: "function", function: { name: "weather", parameters } };
const called = await client.chat.completions.create({
  ...asked,
  max_tokens: 200,
  tools: [tool],
  tool_choice: "required",
  parallel_tool_calls: false,
});
const [call] = called.choices[0].message.tool_calls;
told.call = { name: call.function.name, arguments: JSON.parse(call.function.arguments) };
told.finish = called.choices[0].finish_reason;
const answer = { role: "tool", tool_call_id: call.id, content: '{"degrees": 7}' };
const after = await client.chat.completions.create({
  ...asked,
  messages: [...messages, called.choices[0].message, answer],
});
told.after = after.choices[0].message.content;

const schema = {
  type: "object",
  properties: { name: { type: "string", maxLength: 8 }, count: { type: "integer" } },
  required: ["name", "count"],
  additionalProperties: false,
};
const formed = await client.chat.completions.create({
  ...asked,
  max_tokens: 200,
  response_format: { type: "json_schema", json_schema: { name: "answer", schema } },
});
told.json = JSON.parse(formed.choices[0].message.content);

const vectors = await client.embeddings.create({ model: "search", input: ["one", "two"] });
told.vectors = vectors.data.map((one) => one.embedding.length);

told.models = [];
for await (const model of client.models.list()) told.models.push(model.id);

const failure = async (other, model) => {
  try {
    await other.chat.completions.create({ ...asked, model });
    return null;
  } catch (error) {
    const { status, code, param, message } = error;
    return { kind: error.constructor.name, status, code, param, message };
  }
};
told.unknown = await failure(client, "chatt");
told.forbidden = await failure(client.withOptions({ apiKey: "wrong" }), "chat");

console.log(JSON.stringify(told));
