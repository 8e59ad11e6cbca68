// The page: wires its controls to the microphone, the camera and one live session.

import { LiveClient } from "./client.js";
import { Sound, fromPcm16, toPcm16 } from "./audio.js";
import { Strip } from "./strip.js";
import { TurnTimer } from "./turn.js";

const RATE = 24000; // of the wire, both ways
const FRAME_MS = 1000;
const FRAME_WIDTH = 320;
const CAPTIONS = 200;

const byId = (id) => document.getElementById(id);
const strip = new Strip(byId("strip"));
let client = null;
let sound = null;
let stream = null;
let frames = null;
let line = null; // the caption that the model is writing
let model = "";
let turn = null;

function caption(who, text, kind = "") {
  const item = document.createElement("li");
  const name = document.createElement("span");
  name.className = "who";
  name.textContent = who;
  const words = document.createElement("span");
  words.className = kind;
  words.textContent = text;
  item.append(name, words);
  const list = byId("captions");
  list.append(item);
  while (list.children.length > CAPTIONS) list.firstChild.remove();
  list.scrollTop = list.scrollHeight;
  return words;
}

function state(name, text) {
  const status = byId("status");
  status.dataset.state = name;
  status.textContent = text;
  const live = name === "live";
  byId("text").disabled = byId("send").disabled = byId("mute").disabled = !live;
  if (name === "idle" || name === "error") stop();
}

function tick(event) {
  strip.add(event);
  byId("count").textContent = strip.count;
  byId("step").textContent = `${event.step_ms.toFixed(1)} ms`;
  byId("p99").textContent = `${strip.p99().toFixed(1)} ms`;
}

function hear(samples) {
  turn?.heard(samples);
  client?.hear(toPcm16(samples));
}

function say(base64) {
  const samples = fromPcm16(base64);
  const latency = turn?.said(samples) ?? null;
  if (latency !== null) byId("turn").textContent = `${Math.round(latency)} ms`;
  sound?.play(samples);
}

const on = {
  state,
  tick,
  started: (session) => caption("", `session ${session.id}`, "note"),
  audio: say,
  note: (text) => caption("", text, "note"),
  error: (text) => caption("", text, "error"),
  transcript(text) {
    line ??= caption("model", "");
    line.textContent += text;
    byId("captions").scrollTop = byId("captions").scrollHeight;
    if (line.textContent.length > 400) line = null;
  },
};

async function secret(key) {
  if (!key) return "";
  const answer = await fetch("v1/realtime/client_secrets", {
    method: "POST",
    headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json" },
    body: JSON.stringify({ session: { type: "realtime", model } }),
  });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error?.message ?? `the server answered ${answer.status}`);
  return body.value;
}

async function start() {
  byId("start").disabled = true;
  state("busy", "asking for the microphone");
  const video = byId("use-camera").checked ? { width: { ideal: FRAME_WIDTH } } : false;
  stream = await navigator.mediaDevices.getUserMedia({
    audio: { echoCancellation: true, noiseSuppression: true, channelCount: 1 },
    video,
  });
  turn = new TurnTimer();
  sound = await Sound.open(stream, RATE, hear, (ms) => client?.played(ms));
  client = new LiveClient({ model, rate: RATE, secret: await secret(byId("key").value), on });
  if (video) {
    const camera = byId("camera");
    camera.srcObject = stream;
    camera.hidden = false;
    await camera.play();
    frames = setInterval(look, FRAME_MS);
  }
  byId("start").textContent = "Stop";
  byId("start").disabled = false;
}

function look() {
  const camera = byId("camera");
  if (!camera.videoWidth) return;
  const canvas = document.createElement("canvas");
  canvas.width = FRAME_WIDTH;
  canvas.height = Math.round((FRAME_WIDTH * camera.videoHeight) / camera.videoWidth);
  canvas.getContext("2d").drawImage(camera, 0, 0, canvas.width, canvas.height);
  client?.see(canvas.toDataURL("image/jpeg", 0.7));
}

function stop() {
  clearInterval(frames);
  stream?.getTracks().forEach((track) => track.stop());
  sound?.close();
  client = sound = stream = frames = line = turn = null;
  byId("camera").hidden = true;
  byId("start").textContent = "Start";
  byId("start").disabled = false;
}

byId("start-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (client) {
    client.close();
    return;
  }
  try {
    if (!(await ask())) return;
    await start();
  } catch (error) {
    state("error", error.message);
  }
});

byId("mute").addEventListener("click", () => {
  sound.muted = !sound.muted;
  byId("mute").setAttribute("aria-pressed", sound.muted);
  byId("mute").textContent = sound.muted ? "Unmute" : "Mute";
});

byId("type-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value;
  if (!text || !client) return;
  client.type(text);
  caption("you", text);
  line = null;
  byId("text").value = "";
});

/** Finds out which model there is, and whether the server wants a key. */
async function ask() {
  const key = byId("key").value;
  const answer = await fetch("v1/models", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  byId("key-field").hidden = answer.status !== 401 && !key;
  if (answer.status === 401) {
    byId("model").textContent = "this server wants a key";
    state("error", key ? "the key is wrong" : "enter a key");
    return false;
  }
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  model = (await answer.json()).data[0].id;
  byId("model").textContent = model;
  state("idle", "not connected");
  return true;
}

ask().catch((error) => state("error", error.message));
