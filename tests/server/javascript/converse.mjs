// OpenAI's JavaScript client against one session: `node converse.mjs BASE_URL KEY SESSION`; prints what it saw as JSON.
import OpenAI from "openai";

const [baseURL, apiKey, session] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, defaultHeaders: { "X-Session-ID": session } });
const asked = { model: "m", messages: [{ role: "user", content: "Bo is a cat." }], max_tokens: 8, temperature: 0 };
const seen = { versions: [], streamed: "" };

for (let turn = 0; turn < 2; turn++) {
  const { data, response } = await client.chat.completions.create(asked).withResponse();
  seen.versions.push(response.headers.get("x-session-version"));
  seen.answered = data.choices[0].message.content;
}
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  seen.streamed += chunk.choices[0]?.delta?.content ?? "";
}
const read = await client.chat.completions
  .create(asked, { headers: { "X-DeltaMem-Mode": "read" } })
  .withResponse();
seen.commitOfRead = read.response.headers.get("x-deltamem-commit");
try {
  await client.completions.create({ model: "m", prompt: "Bo is", max_tokens: 4, n: 2 });
} catch (error) {
  seen.refused = [error.status, error.message];
}
seen.session = await client.get(`/sessions/${session}`);
console.log(JSON.stringify(seen));
