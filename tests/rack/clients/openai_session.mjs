// One scripted session with the official client for node; prints what it got as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const asked = { model: "m", temperature: 0, max_tokens: 100 };
const question = [{ role: "user", content: "What is the capital of France?" }];
const weather = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather in a town",
    parameters: {
      type: "object",
      properties: { town: { type: "string", enum: ["Oslo", "Rome"] } },
      required: ["town"],
      additionalProperties: false,
    },
  },
};
const city = {
  type: "object",
  properties: {
    name: { type: "string", maxLength: 20 },
    continent: { enum: ["Europe", "Asia", "Africa"] },
  },
  required: ["name", "continent"],
  additionalProperties: false,
};

const whole = (await client.chat.completions.create({ ...asked, messages: question })).choices[0].message.content;
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, messages: question, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
const tools = {
  ...asked,
  messages: [{ role: "user", content: "How is the weather in Oslo?" }],
  tools: [weather],
  tool_choice: { type: "function", function: { name: "weather" } },
};
const call = (await client.chat.completions.create(tools)).choices[0].message.tool_calls[0].function;
const final = await client.chat.completions.stream(tools).finalChatCompletion();
const { name, arguments: written } = final.choices[0].message.tool_calls[0].function;
const format = { type: "json_schema", json_schema: { name: "city", strict: true, schema: city } };
const described = await client.chat.completions.create({
  ...asked,
  messages: [{ role: "user", content: "Describe Rome." }],
  response_format: format,
});
const vectors = await client.embeddings.create({ model: "e", input: ["a cat"] });
let error = null;
try {
  await client.chat.completions.create({ ...asked, model: "other", messages: question });
} catch (caught) {
  error = [caught.status, caught.code];
}
console.log(
  JSON.stringify({
    whole,
    streamed,
    call,
    streamedCall: { name, arguments: written },
    schema: described.choices[0].message.content,
    vector: vectors.data[0].embedding.length,
    error,
  }),
);
