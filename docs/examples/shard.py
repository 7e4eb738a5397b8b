"""Shard a model over eight devices, virtual ones on a CPU: python docs/examples/shard.py CHECKPOINT"""

import sys

import jax

import omni_jax


def main(checkpoint: str) -> omni_jax.Reply:
    jax.config.update("jax_num_cpu_devices", 8)  # before JAX starts; TPUs and GPUs are what they are
    model = omni_jax.load(checkpoint, mesh="2x4")
    weight = model.params["thinker"]["lm_head"]["weight"]
    print(f"lm_head {weight.shape} lies as {weight.sharding.spec} on {len(weight.sharding.device_set)} devices")
    reply = model.generate([{"role": "user", "content": "What is a cat?"}], max_new_tokens=8)
    print(reply.text)
    return reply


if __name__ == "__main__":
    main(sys.argv[1])
