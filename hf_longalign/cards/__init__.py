"""Cards of data sets and adapters: pages made from records, and what people wrote into them."""

from hf_longalign.cards.adapter import adapter_card, write_adapter_card
from hf_longalign.cards.dataset import DataRecord, DataSource, dataset_card
from hf_longalign.cards.page import merge_card


__all__ = ["DataRecord", "DataSource", "adapter_card", "dataset_card", "merge_card", "write_adapter_card"]
