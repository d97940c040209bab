"""The papers: what a card says about a network's source."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Paper:
    """A paper, and how far this package follows it.

    Attributes:
        arxiv: arXiv id, or '' for what was not published there.
        summary: What the mechanism does, in one sentence.
        caveat: What a reader must know before comparing with the paper.
        claim: What it says it gains, with the source of the figures.
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
        """Where it can be read."""
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


#: For networks that are timm's own.
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
        "A plain residual network, the control of the networks with attention.",
    ),
    "se": Paper(
        "Squeeze-and-Excitation Networks",
        "Jie Hu and Li Shen and Samuel Albanie and Gang Sun and Enhua Wu",
        "CVPR 2018",
        2018,
        "1709.01507",
        "Channel attention in every block, the control of the newer mechanisms.",
    ),
    "dia": Paper(
        "DIANet: Dense-and-Implicit Attention Network",
        "Zhongzhan Huang and Senwei Liang and Mingfu Liang and Haizhao Yang",
        "AAAI 2020",
        2020,
        "1905.10671",
        "One recurrent attention unit shared by all blocks of a stage.",
        claim="ResNet-164 on CIFAR-100: 76.67 % against 73.43 % of the plain network (means of 5 runs; the "
        "authors' code).",
    ),
    "asr": Paper(
        "Stripe Observation Guided Inference Cost-free Attention Mechanism",
        "Shanshan Zhong and Zhongzhan Huang and Wushao Wen and Jinghui Qin and Liang Lin",
        "ECCV 2024",
        2024,
        "2304.06345",
        "Channel attention on a learnt constant, which folds into the norm layer before it and costs nothing "
        "at inference.",
        claim="ResNet-164 on CIFAR-100: 75.21 % against 74.10 % of the plain network, best epoch on the test "
        "split; 74.43 % against 73.54 % at the last epoch (single runs; the authors' code and logs).",
    ),
    "conam": Paper(
        "ConAM: Confidence Attention Module for Convolutional Neural Networks",
        "Yu Xue and Ziming Yuan and Ferrante Neri",
        "arXiv 2021, withdrawn 2022",
        2021,
        "2110.14369",
        "Weights the patches of a feature map by how far they agree with the whole of it.",
        "The paper was withdrawn from arXiv by its authors (conflict of interest). The formula is that of "
        "their published code; the hidden width, C / 16 by default, is this package's choice.",
        claim="ResNet-50 on CIFAR-10: about half a point above the plain network, read off a figure.",
    ),
    "fmm": Paper(
        "Towards Understanding the Effectiveness of Attention Mechanism",
        "Xiang Ye and Zihang He and Heng Wang and Yong Li",
        "arXiv 2021",
        2021,
        "2106.15067",
        "FMMNet: the residual sum replaced by a product of feature maps.",
        "The paper's text multiplies the branch and the shortcut as they are, which is mode `raw` here. "
        "Modes `bn` (the default) and `sigmoid` normalise both first, as in the first author's code; mode "
        "`gate` and, in all but `raw`, the start with a constant branch are this package's choice.",
        claim="FMMNet outperforms ResNet on various data sets (abstract).",
    ),
    "ssia": Paper(
        "Self-Supervised Implicit Attention: Guided Attention by The Model Itself",
        "Jinyi Wu and Xun Gong and Zhemin Zhang",
        "arXiv 2022",
        2022,
        "2206.07434",
        "A self-supervised loss by which each stage guides the one below it, in training only.",
        "A re-implementation from the abstract: no code is published, and the loss is this package's "
        "reading.",
        claim="It outperforms SE and CBAM on several image classification data sets (abstract).",
    ),
}
PAPERS["asr_se"] = replace(
    PAPERS["asr"],
    summary="Two channel attentions: one on a learnt constant (ASR), which folds into the norm layer before "
    "it, and SE on top of it, which stays.",
)
PAPERS["sem"] = Paper(
    "Switchable Self-attention Module",
    "Shanshan Zhong and Wushao Wen and Jinghui Qin",
    "arXiv 2022",
    2022,
    "2209.05680",
    "Three channel attentions in every block, between which a switch decides.",
    claim="ResNet-164 on CIFAR-10: 94.95 % against 93.39 %; on CIFAR-100: 76.76 % against 74.30 % (the "
    "authors' code).",
)
PAPERS["spem"] = Paper(
    "SPEM: Self-adaptive Pooling Enhanced Attention Module for Image Recognition",
    "Shanshan Zhong and Wushao Wen and Jinghui Qin",
    "MMM 2023",
    2023,
    "2208.10322",
    "Channel attention on a learnt mixture of each channel's largest and smallest value.",
    claim="ResNet-164: 94.80 % on CIFAR-10, 76.31 % on CIFAR-100 (the authors' code).",
)
