// @openai/agents-realtime over a WebSocket: a typed turn, a function that the client offers, and a spoken turn.
import { RealtimeAgent, RealtimeSession, tool } from "@openai/agents-realtime";

const RATE = 24000;
const { OPENAI_BASE_URL, OPENAI_API_KEY, MODEL } = process.env;
const fail = (error) => { console.error(error); process.exit(1); };
setTimeout(() => fail(new Error("it takes too long")), 300_000).unref();

function noise(seconds, loud) {
  return Int16Array.from({ length: seconds * RATE }, () => (Math.random() * 2 - 1) * loud * 32767);
}

const weather = tool({
  name: "weather",
  description: "The weather of a city.",
  parameters: {
    type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false,
  },
  execute: async () => "sunny",
});
const agent = new RealtimeAgent({ name: "Ada", instructions: "Be brief.", tools: [weather], voice: "Chelsie" });
const session = new RealtimeSession(agent, { transport: "websocket", model: MODEL, tracingDisabled: true });
let bytes = 0;
let ended = () => {};
const answered = () => new Promise((resolve) => { ended = resolve; });
session.on("error", (event) => fail(event.error));
session.on("audio", (event) => { bytes += event.data.byteLength; });
session.transport.on("turn_done", () => ended());

await session.connect({ apiKey: OPENAI_API_KEY, url: `${OPENAI_BASE_URL.replace("http", "ws")}/realtime?model=${MODEL}` });
let done = answered();
session.sendMessage("Hello");
await done;
const first = bytes;
done = answered();
for (const [seconds, loud] of [[1, 1e-3], [1, 0.6], [2.5, 1e-3]]) {
  const samples = noise(seconds, loud);
  for (let at = 0; at < samples.length; at += 2400) session.sendAudio(samples.slice(at, at + 2400).buffer);
}
await done;
if (!first || bytes <= first || bytes % 2) fail(new Error(`${first} and ${bytes} bytes of audio`));
console.log(`${(bytes / 2 / RATE).toFixed(2)} s of speech in two replies, ${session.history.length} items`);
session.close();
process.exit(0);
