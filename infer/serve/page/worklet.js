// Plays what it is given, sample by sample, and forgets it at once when told to; records in blocks of 100 ms.
class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = []; this.at = 0; this.played = 0; this.gaps = 0; this.open = false; this.count = 0; this.peak = 0;
    this.port.onmessage = ({ data }) => {
      if (data.samples) { this.queue.push(data.samples); this.open = true; }
      if (data.flush) { this.queue = []; this.at = 0; this.open = false; }
      if (data.ended) this.open = false;
      if (data.begin) { this.played = 0; this.gaps = 0; }
    };
  }
  process(_, [[out]]) {
    for (let i = 0; i < out.length; i++) {
      const block = this.queue[0];
      if (!block) { if (this.open && this.played) this.gaps++; continue; }
      out[i] = block[this.at++]; this.played++;
      this.peak = Math.max(this.peak, Math.abs(out[i]));
      if (this.at === block.length) { this.queue.shift(); this.at = 0; }
    }
    if (++this.count % 16 === 0) {
      this.port.postMessage({ played: this.played / sampleRate, gaps: this.gaps / sampleRate, peak: this.peak });
      this.peak = 0;
    }
    return true;
  }
}
class Recorder extends AudioWorkletProcessor {
  constructor() { super(); this.block = new Float32Array(2400); this.at = 0; }
  process([[input]]) {
    if (!input) return true;
    for (const sample of input) {
      this.block[this.at++] = sample;
      if (this.at === this.block.length) { this.port.postMessage(this.block.slice()); this.at = 0; }
    }
    return true;
  }
}
registerProcessor("player", Player);
registerProcessor("recorder", Recorder);
