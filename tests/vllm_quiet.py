"""vLLM's processes doze while they wait for each other's messages: on two cores they would spin at the expense of whom they wait for."""

import time

from vllm.distributed.device_communicators import shm_broadcast

shm_broadcast.sched_yield = lambda: time.sleep(2e-4)
