// The page: a client of /v1/realtime. No libraries, nothing loaded from elsewhere.
const RATE = 24000;
const $ = (id) => document.getElementById(id);
let socket, sound, player, microphone, camera, session, asked, item;

const say = (text) => { $("state").textContent = text; };
const send = (type, fields = {}) => socket?.readyState === 1 && socket.send(JSON.stringify({ type, ...fields }));

function line(role, text = "") {
  const p = document.createElement("p");
  p.className = role;
  p.textContent = text;
  $("log").append(p);
  $("log").scrollTop = $("log").scrollHeight;
  return p;
}

// Samples to base64 and back.
function encode(samples) {
  const out = new DataView(new ArrayBuffer(samples.length * 2));
  samples.forEach((s, i) => out.setInt16(2 * i, Math.max(-1, Math.min(1, s)) * 32767, true));
  let text = "";
  const bytes = new Uint8Array(out.buffer);
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}
function decode(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return Float32Array.from(new Int16Array(bytes.buffer), (s) => s / 32768);
}

async function openSound() {
  if (sound) return sound.resume();
  sound = new AudioContext({ sampleRate: RATE });
  await sound.audioWorklet.addModule("page/worklet.js");
  player = new AudioWorkletNode(sound, "player", { numberOfInputs: 0, outputChannelCount: [1] });
  player.connect(sound.destination);
  player.port.onmessage = ({ data }) => {
    if (item) item.played = data.played;
    $("out-level").value = data.peak;
    $("t-played").textContent = `${data.played.toFixed(1)} s`;
    $("t-gaps").textContent = `${data.gaps.toFixed(2)} s`;
  };
}

// The connection

async function connect() {
  await openSound();
  const where = new URL("v1/realtime", location.href);
  where.protocol = where.protocol.replace("http", "ws");
  if (session) where.searchParams.set("session_id", session);
  const key = $("key").value;
  socket = new WebSocket(where, ["realtime", ...(key ? [`openai-insecure-api-key.${key}`] : [])]);
  say("Connecting…");
  socket.onmessage = ({ data }) => handle(JSON.parse(data));
  socket.onopen = () => enable(true);
  socket.onclose = () => {
    enable(false);
    flush();
    stopMicrophone();
    say("Not connected");
  };
}

function enable(on) {
  for (const id of ["send", "stop", "mic", "cam", "file", "shot"]) $(id).disabled = !on;
  $("connect").textContent = on ? "Disconnect" : "Connect";
}

function update() {
  const settings = {
    type: "realtime", instructions: $("instructions").value, output_modalities: [$("output").value],
    audio: { input: { turn_detection: { type: "server_vad", silence_duration_ms: Number($("silence").value) || 500 } } },
  };
  if ($("voice").value) settings.audio.output = { voice: $("voice").value };
  send("session.update", { session: settings });
}

// What the server says

const HANDLERS = {
  "session.created": (e) => {
    session = e.session.id;
    if (!$("voice").value) $("voice").placeholder = e.session.audio.output.voice || "none";
    if (e.session.output_modalities[0] === "text") $("output").value = "text";
    say("Connected");
    update();
  },
  "input_audio_buffer.speech_started": () => {
    say("Listening…");
    interrupt(false);
  },
  "input_audio_buffer.speech_stopped": () => { asked = performance.now(); say("Thinking…"); },
  "input_audio_buffer.committed": () => line("user", "(spoken)"),
  "response.created": (e) => {
    player.port.postMessage({ begin: true });
    item = { id: null, response: e.response.id, p: line("assistant"), played: 0, text: false, audio: false };
    say("Answering…");
  },
  "response.output_item.added": (e) => { item.id = e.item.id; },
  "response.output_text.delta": (e) => write(e),
  "response.output_audio_transcript.delta": (e) => write(e),
  "response.output_audio.delta": (e) => {
    if (!item || e.response_id !== item.response || item.flushed) return;
    if (!item.audio) { item.audio = true; $("t-audio").textContent = since(); }
    player.port.postMessage({ samples: decode(e.delta) });
  },
  "response.done": (e) => {
    player.port.postMessage({ ended: true });
    const failed = e.response.status_details?.error;
    if (failed) line("error", failed.message);
    say(e.response.status === "cancelled" ? "Interrupted" : "Connected");
  },
  error: (e) => {
    if (e.error.code === "session_not_found") { session = null; connect(); return; }
    if (e.error.code !== "response_cancel_not_active") line("error", e.error.message);
  },
};
const handle = (event) => HANDLERS[event.type]?.(event);
const since = () => `${((performance.now() - asked) / 1000).toFixed(2)} s`;

function write(event) {
  if (!item) return;
  if (!item.text) { item.text = true; $("t-text").textContent = since(); }
  item.p.textContent += event.delta;
  $("log").scrollTop = $("log").scrollHeight;
}

const flush = () => player?.port.postMessage({ flush: true });

// Ends what is played; the server is told how much of it was heard.
function interrupt(cancel) {
  flush();
  if (!item || item.flushed) return;
  item.flushed = true;
  if (cancel) send("response.cancel");
  if (item.id && item.audio) {
    send("conversation.item.truncate", {
      item_id: item.id, content_index: 0, audio_end_ms: Math.round(1000 * item.played),
    });
  }
}

// What the user says

function ask(content, role = "user") {
  asked = performance.now();
  send("conversation.item.create", { item: { type: "message", role, content } });
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  interrupt(true);
  ask([{ type: "input_text", text }]);
  line("user", text);
  $("text").value = "";
  send("response.create");
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("stop").addEventListener("click", () => interrupt(true));
$("connect").addEventListener("click", () => (socket?.readyState === 1 ? socket.close() : connect().catch(fail)));
$("apply").addEventListener("click", () => update());
const fail = (error) => { line("error", error.message); say("Not connected"); };

async function picture(source, width, height) {
  const scale = Math.min(1, 1024 / Math.max(width, height));
  const canvas = Object.assign(document.createElement("canvas"), { width: width * scale, height: height * scale });
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  const url = canvas.toDataURL("image/jpeg", 0.9);
  ask([{ type: "input_image", image_url: url }]);
  const img = Object.assign(new Image(), { src: url, alt: "The picture that you sent" });
  line("user").append(img);
}

$("file").addEventListener("change", async () => {
  const file = $("file").files[0];
  $("file").value = "";
  try {
    if (file?.type.startsWith("image/")) {
      const bitmap = await createImageBitmap(file);
      await picture(bitmap, bitmap.width, bitmap.height);
    } else if (file) {
      const samples = await sound.decodeAudioData(await file.arrayBuffer());
      ask([{ type: "input_audio", audio: encode(samples.getChannelData(0)) }]);
      line("user", `(${file.name}, ${samples.duration.toFixed(1)} s)`);
    }
  } catch (error) { fail(error); }
});

// Microphone and camera

async function startMicrophone() {
  const stream = await navigator.mediaDevices.getUserMedia({
    audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true },
  });
  await openSound();
  const recorder = new AudioWorkletNode(sound, "recorder", { numberOfOutputs: 0 });
  recorder.port.onmessage = ({ data }) => {
    $("in-level").value = data.reduce((m, s) => Math.max(m, Math.abs(s)), 0);
    send("input_audio_buffer.append", { audio: encode(data) });
  };
  const source = sound.createMediaStreamSource(stream);
  source.connect(recorder);
  microphone = { stream, source };
  $("mic").setAttribute("aria-pressed", "true");
}
function stopMicrophone() {
  microphone?.source.disconnect();
  microphone?.stream.getTracks().forEach((track) => track.stop());
  microphone = null;
  $("mic").setAttribute("aria-pressed", "false");
  $("in-level").value = 0;
}
$("mic").addEventListener("click", () => (microphone ? stopMicrophone() : startMicrophone().catch(fail)));

$("cam").addEventListener("click", async () => {
  const on = !camera;
  try {
    if (on) {
      camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      $("camera").srcObject = camera;
      await $("camera").play();
    } else {
      camera.getTracks().forEach((track) => track.stop());
      camera = null;
    }
    $("camera").hidden = $("shot").hidden = !on;
    $("cam").setAttribute("aria-pressed", String(on));
  } catch (error) { fail(error); }
});
$("shot").addEventListener("click", () => picture($("camera"), $("camera").videoWidth, $("camera").videoHeight));
