"""What a card asks to be cited, as BibTeX; titles, authors and numbers as the papers' own pages give them."""

from collections.abc import Iterable

from hf_longalign.cards.markdown import fenced


BIBTEX = {
    "context_synthesis": """\
@article{zhu2025generalizing,
  title   = {Generalizing From Short to Long: Effective Data Synthesis for Long-Context Instruction Tuning},
  author  = {Zhu, Wenhao and Chen, Pinzhen and Hu, Hanxu and Huang, Shujian and Yuan, Fei and Chen, Jiajun and \
Birch, Alexandra},
  journal = {arXiv preprint arXiv:2502.15592},
  year    = {2025}
}""",
    "skipalign": """\
@article{wu2024long,
  title   = {Long Context Alignment with Short Instructions and Synthesized Positions},
  author  = {Wu, Wenhao and Wang, Yizhong and Fu, Yao and Yue, Xiang and Zhu, Dawei and Li, Sujian},
  journal = {arXiv preprint arXiv:2405.03939},
  year    = {2024}
}""",
    "pose": """\
@article{zhu2023pose,
  title   = {PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise Training},
  author  = {Zhu, Dawei and Yang, Nan and Wang, Liang and Song, Yifan and Wu, Wenhao and Wei, Furu and Li, Sujian},
  journal = {arXiv preprint arXiv:2309.10400},
  year    = {2023}
}""",
    "longalign": """\
@article{bai2024longalign,
  title   = {LongAlign: A Recipe for Long Context Alignment of Large Language Models},
  author  = {Bai, Yushi and Lv, Xin and Zhang, Jiajie and He, Yuze and Qi, Ji and Hou, Lei and Tang, Jie and \
Dong, Yuxiao and Li, Juanzi},
  journal = {arXiv preprint arXiv:2401.18058},
  year    = {2024}
}""",
    "longbench": """\
@article{bai2023longbench,
  title   = {LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding},
  author  = {Bai, Yushi and Lv, Xin and Zhang, Jiajie and Lyu, Hongchang and Tang, Jiankai and Huang, Zhidian and \
Du, Zhengxiao and Liu, Xiao and Zeng, Aohan and Hou, Lei and Dong, Yuxiao and Tang, Jie and Li, Juanzi},
  journal = {arXiv preprint arXiv:2308.14508},
  year    = {2023}
}""",
    "trl": """\
@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and \
Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}""",
}


def cite(names: Iterable[str]) -> str:
    """Return a block of the BibTeX entries of `names`, keys of `BIBTEX`."""
    return fenced("bibtex", "\n\n".join(BIBTEX[name] for name in names))
