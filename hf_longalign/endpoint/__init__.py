"""One client of OpenAI-compatible servers for synthesis and evaluation, and the protocol that generators share."""

from hf_longalign.endpoint.address import Endpoint
from hf_longalign.endpoint.batch import BatchGenerator
from hf_longalign.endpoint.batch_places import CommandBatches, HostedBatches
from hf_longalign.endpoint.client import OpenAIGenerator
from hf_longalign.endpoint.protocol import (
    EndpointError,
    Fault,
    GenerationError,
    Generator,
    NoReplyError,
    Reply,
    Request,
    RunStopped,
    Sampling,
    SwitchGenerator,
)


__all__ = [
    "BatchGenerator",
    "CommandBatches",
    "Endpoint",
    "EndpointError",
    "Fault",
    "GenerationError",
    "Generator",
    "HostedBatches",
    "NoReplyError",
    "OpenAIGenerator",
    "Reply",
    "Request",
    "RunStopped",
    "Sampling",
    "SwitchGenerator",
]
