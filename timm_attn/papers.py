"""The papers, as cited in model cards."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Paper:
    """A paper, and how far this package follows it.

    Attributes:
        arxiv: arXiv id, or '' if it is not on arXiv.
        summary: What the mechanism does, in one sentence.
        caveat: What a reader must know before comparing with the paper.
        claim: The improvement that it reports, with the source of the figures.
    """

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str
    summary: str
    caveat: str = ""
    claim: str = ""

    @property
    def url(self) -> str:
        """URL of the paper, or of timm."""
        return (
            f"https://arxiv.org/abs/{self.arxiv}"
            if self.arxiv
            else "https://github.com/huggingface/pytorch-image-models"
        )

    @property
    def bibtex(self) -> str:
        return (
            f"@misc{{{self.title.split()[0].lower().strip(':')}{self.year},\n  title  = {{{self.title}}},\n"
            f"  author = {{{self.authors}}},\n  year   = {{{self.year}}},\n"
            f"  note   = {{{self.venue}}},\n  url    = {{{self.url}}}\n}}"
        )


#: For timm's own networks.
TIMM = Paper(
    "PyTorch Image Models",
    "Ross Wightman",
    "GitHub",
    2019,
    "",
    "A network of timm, trained as a baseline.",
)

#: By the mechanism's key in the table of mechanisms; ``resnet`` is the plain network.
PAPERS = {
    "resnet": Paper(
        "Deep Residual Learning for Image Recognition",
        "Kaiming He and Xiangyu Zhang and Shaoqing Ren and Jian Sun",
        "CVPR 2016",
        2016,
        "1512.03385",
        "A plain residual network, the baseline for the networks with attention.",
    ),
    "se": Paper(
        "Squeeze-and-Excitation Networks",
        "Jie Hu and Li Shen and Samuel Albanie and Gang Sun and Enhua Wu",
        "CVPR 2018",
        2018,
        "1709.01507",
        "Channel attention in every block, a baseline for the newer mechanisms.",
    ),
    "dia": Paper(
        "DIANet: Dense-and-Implicit Attention Network",
        "Zhongzhan Huang and Senwei Liang and Mingfu Liang and Haizhao Yang",
        "AAAI 2020",
        2020,
        "1905.10671",
        "One recurrent attention unit shared by all blocks of a stage.",
        claim="ResNet-164 on CIFAR-100: 76.67 %, against 73.43 % for the plain network (means of 5 runs; "
        "source: the authors' code).",
    ),
    "asr": Paper(
        "Stripe Observation Guided Inference Cost-free Attention Mechanism",
        "Shanshan Zhong and Zhongzhan Huang and Wushao Wen and Jinghui Qin and Liang Lin",
        "ECCV 2024",
        2024,
        "2304.06345",
        "Channel attention on a learned constant, which folds into the norm layer before it and costs "
        "nothing at inference.",
        claim="ResNet-164 on CIFAR-100: 75.21 %, against 74.10 % for the plain network, in the best epoch on "
        "the test split; 74.43 % against 73.54 % in the last epoch (single runs; source: the authors' code "
        "and logs).",
    ),
    "conam": Paper(
        "ConAM: Confidence Attention Module for Convolutional Neural Networks",
        "Yu Xue and Ziming Yuan and Ferrante Neri",
        "arXiv 2021, withdrawn 2022",
        2021,
        "2110.14369",
        "Weights each patch of a feature map by its agreement with the whole map.",
        "The paper was withdrawn from arXiv by its authors (conflict of interest). The formula is that of "
        "their published code; the hidden width, C / 16 by default, is this package's choice.",
        claim="ResNet-50 on CIFAR-10: about half a point above the plain network (read off a figure).",
    ),
    "fmm": Paper(
        "Towards Understanding the Effectiveness of Attention Mechanism",
        "Xiang Ye and Zihang He and Heng Wang and Yong Li",
        "arXiv 2021",
        2021,
        "2106.15067",
        "FMMNet: a product of feature maps in place of the residual sum.",
        "The text of the paper multiplies the branch and the shortcut as they are (mode `raw` here). Modes "
        "`bn` (the default: both are normalised first) and `sigmoid` (1 + σ of the branch, which ends "
        "without a norm, times the normalised shortcut) are those of the first author's code. Mode `gate` "
        "and, in all modes but `raw`, the initialisation to a constant branch are this package's choice.",
        claim="FMMNet outperforms ResNet on various datasets (abstract).",
    ),
    "ssia": Paper(
        "Self-Supervised Implicit Attention: Guided Attention by The Model Itself",
        "Jinyi Wu and Xun Gong and Zhemin Zhang",
        "arXiv 2022",
        2022,
        "2206.07434",
        "A self-supervised auxiliary loss, in training only, by which each stage guides the one before it.",
        "Re-implemented from the abstract: no code is published, and the loss is this package's "
        "interpretation.",
        claim="SSIA outperforms SE and CBAM on several image classification datasets (abstract).",
    ),
}
PAPERS["asr_se"] = replace(
    PAPERS["asr"],
    summary="Two channel attentions: one on a learned constant (ASR), which folds into the norm layer before "
    "it, and SE on top, which stays.",
)
PAPERS["sem"] = Paper(
    "Switchable Self-attention Module",
    "Shanshan Zhong and Wushao Wen and Jinghui Qin",
    "arXiv 2022",
    2022,
    "2209.05680",
    "Three channel attentions in every block, weighted by a learned switch.",
    claim="ResNet-164: 94.95 % against 93.39 % on CIFAR-10, 76.76 % against 74.30 % on CIFAR-100 (source: "
    "the authors' code).",
)
PAPERS["spem"] = Paper(
    "SPEM: Self-adaptive Pooling Enhanced Attention Module for Image Recognition",
    "Shanshan Zhong and Wushao Wen and Jinghui Qin",
    "MMM 2023",
    2023,
    "2208.10322",
    "Channel attention on a learned mixture of the maximum and the minimum of each channel.",
    claim="ResNet-164: 94.80 % on CIFAR-10, 76.31 % on CIFAR-100 (source: the authors' code).",
)


def paper_of(mechanism: str) -> Paper:
    """The paper of a mechanism; for attention that timm has, timm."""
    if mechanism in PAPERS or mechanism == "timm":
        return PAPERS.get(mechanism, TIMM)
    return replace(TIMM, summary=f"timm's `{mechanism}` at the end of every residual branch, as a baseline.")
