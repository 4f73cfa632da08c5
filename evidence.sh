#!/usr/bin/env bash
# The evidence of docs/conclusions.md, and the study's own 30 epochs of docs/erratum.md: trained, evaluated, compared.
#
#   bash evidence.sh                      what is not done yet; on two CPU cores:
#                                         loss, decoders and weights an hour, muon and layers half of one each,
#                                         data 45 minutes, deep an hour and three quarters, published 27, inversion 20
#   bash evidence.sh loss layers          some of them
#   SEEDS="1 2" bash evidence.sh          other seeds than 1, 2 and 3 (deep and published have one, 42; inversion none)
#   RUNS=folder bash evidence.sh          another folder than runs/evidence
#
# It wants natural/ (README, "Results") and wide/ (docs/experiments.md) in this folder, and deep imagenet/ too
# (docs/conclusions.md, "Method"). What was interrupted goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
seeds=${SEEDS:-1 2 3}
root=${RUNS:-runs/evidence}
groups="loss decoders muon weights layers data deep published inversion"

lowest() { # of the runs in these folders, the name of the one with the lowest validation loss
  python - "$@" << 'END'
import csv, sys
from pathlib import Path
def loss(run):
    return min(float(row["val_loss"]) for row in csv.DictReader(open(Path(run, "history.csv"))))
print(Path(min(sys.argv[1:], key=loss)).name)
END
}

# GROUP/NAME "RATES" FLAGS…: trains with each of several rates and the first seed, with the best of them and the other
# seeds, and evaluates.
train() {
  local name=$1 rates=$2 rate seed run first=${seeds%% *}
  local tried=$root/rates/$name/seed$first
  shift 2
  rate=$rates
  if [[ $rates == *" "* ]]; then
    for rate in $rates; do
      python train.py "$@" --lr "$rate" --seed "$first" --out "$tried/$rate" --resume
    done
    rate=$(lowest "$tried"/*)
  fi
  for seed in $seeds; do
    run=$root/$name/seed$seed
    if [[ -f $run/metrics.json ]]; then continue; fi
    if [[ $seed == "$first" && -d $tried/$rate && ! -d $run ]]; then
      mkdir -p "$root/$name"
      cp -r "$tried/$rate" "$run"
    fi
    python train.py "$@" --lr "$rate" --seed "$seed" --out "$run" --resume
    python evaluate.py --ckpt "$run/best.pt"
  done
}

measure() { # CHECKPOINT DATA FOLDER: its results on other data than it was trained with
  local out=$root/$3
  if [[ -f $out/metrics.json ]]; then return; fi
  python evaluate.py --ckpt "$1" --data "$2" --out "$out"
}

compare() { # FOLDER FIRST OTHER…: how the others differ from the first, in FOLDER/compare.csv and .png
  local out=$root/$1
  shift
  python evaluate.py --compare "${@/#/$root/}" --out "$out"
}

mse="--mse-weight 1 --lpips-weight 0"
fast="--config configs/fast.yaml --data natural"
best="--config configs/best.yaml --optimizer adam --epochs 1 --data natural"
deep="--config configs/best.yaml --optimizer adam --decoder residual --batch-size 8"

loss() { # block1 and tconv, a minute and a half each
  train loss/hybrid 1e-2 $fast
  train loss/mse 1e-2 $fast $mse --passes 20
  train loss/lpips "3e-3 1e-2" $fast --mse-weight 0 --lpips-weight 1
  compare loss loss/hybrid loss/mse loss/lpips
}

decoders() { # block1 and MSE, a minute and a half each
  train loss/mse 1e-2 $fast $mse --passes 20
  train decoders/residual "7e-4 2e-3" $best --decoder residual --passes 7
  train decoders/feedback "7e-4 1.4e-3 2.8e-3" $best --passes 4
  compare decoders loss/mse decoders/residual decoders/feedback
}

muon() { # the same three decoders by Muon
  train muon/tconv "3e-3 1e-2" $fast $mse --passes 20 --optimizer muon
  train muon/residual "7e-4 2e-3" $best --decoder residual --passes 6 --optimizer muon
  train muon/feedback 1.4e-3 $best --passes 4 --optimizer muon
  compare muon muon/{tconv,residual,feedback}
  compare muon/tconv loss/mse muon/tconv
  compare muon/residual decoders/residual muon/residual
  compare muon/feedback decoders/feedback muon/feedback
}

weights() { # ImageNet's or random ones
  train loss/hybrid 1e-2 $fast
  train weights/block1 "1e-2 3e-3" $fast --weights random
  compare weights loss/hybrid weights/block1
}

layers() { # AlexNet, MSE, under a minute each: one convolution deep at four resolutions; one to five deep at 13×13
  local rates="7e-4 2e-3" alexnet="$deep --crop 160 --kept-crops 4 --epochs 1 --data natural"
  train layers/conv1_55 "$rates" $alexnet --encoder torchvision/alexnet --layer features.1 --passes 2
  train layers/conv1_27 "$rates" $alexnet --encoder docs/pooled.py:by_2 --layer 2 --passes 4
  train layers/conv1_13 "$rates" $alexnet --encoder docs/pooled.py:by_4 --layer 2 --passes 7
  train layers/conv1_6 "$rates" $alexnet --encoder docs/pooled.py:by_8 --layer 2 --passes 7
  train layers/conv2_13 "$rates" $alexnet --encoder torchvision/alexnet --layer features.5 --passes 6
  train layers/conv3_13 "$rates" $alexnet --encoder torchvision/alexnet --layer features.7 --passes 6
  train layers/conv4_13 "$rates" $alexnet --encoder torchvision/alexnet --layer features.9 --passes 6
  train layers/conv5_13 "$rates" $alexnet --encoder torchvision/alexnet --layer features.11 --passes 6
  compare layers/resolution layers/conv1_{13,55,27,6}
  compare layers/depth layers/conv{1,2,3,4,5}_13
  compare layers/both layers/conv1_6 layers/conv5_13
}

data() { # AlexNet features.10, MSE, as many steps of 80, 320, 640 and 3,082: 80 % of so many photographs
  local all="$deep --encoder torchvision/alexnet --layer features.10 --crop 160 --epochs 3 --data wide --val-images 160"
  train data/100 "7e-4 2e-3" $all --train-images 80 --kept-crops 64 --passes 77
  train data/400 "7e-4 2e-3" $all --train-images 320 --kept-crops 32 --passes 19
  train data/800 "7e-4 2e-3" $all --train-images 640 --kept-crops 16 --passes 10
  train data/3853 "7e-4 2e-3" $all --kept-crops 4 --passes 2
  compare data data/3853 data/800 data/400 data/100
}

deep() { # the decoders of pretrained/ but by Muon, and AlexNet's features.10: MSE, wide's photographs, one seed
  local seeds=42 wide="--data wide --val-images 160" feedback="--config configs/best.yaml" data name
  local residual="$feedback --decoder residual --batch-size 8 --passes 2 --epochs 8"
  local alexnet="$residual $wide --crop 192 --kept-crops 4 --encoder"
  train deep/muon/vgg16_block2 1.4e-3 $feedback $wide --layer block2 --passes 2 --epochs 2
  train deep/muon/vgg16_block3 1.4e-3 $feedback $wide --layer block3 --passes 1 --epochs 4 --width 128
  train deep/muon/vgg16_block4 2e-3 $residual $wide --layer block4 --crop 160 --kept-crops 2
  train deep/muon/alexnet_conv1 1.4e-3 $feedback $wide --encoder alexnet --layer conv1 --crop 160 --passes 1 --epochs 4
  train deep/muon/alexnet_conv3 1.4e-3 $feedback $wide --encoder alexnet --layer conv3 --crop 160 --passes 1 --epochs 2
  train deep/muon/alexnet_features.10 2e-3 $alexnet torchvision/alexnet --layer features.10
  train deep/muon/alexnet_conv5 2e-3 $alexnet alexnet --layer conv5
  for data in natural imagenet; do
    for name in vgg16_block{2,3,4} alexnet_conv{1,3,5}; do
      measure "pretrained/$name.pt" $data "deep/adam/$name/$data"
      measure "$root/deep/muon/$name/seed42/best.pt" $data "deep/muon/$name/$data"
      compare "deep/$name/$data" deep/{adam,muon}/"$name/$data"
    done
    measure "$root/deep/muon/alexnet_features.10/seed42/best.pt" $data "deep/muon/alexnet_features.10/$data"
  done
}

published() { # the study's own recipe and code, one seed
  seeds=42 train published 1e-4 --protocol published --data natural
}

invert() { # NAME FLAGS…: pixels whose features are those of four test images, if that is not done
  local out=$root/inversion/$1
  shift
  if [[ -f $out/inversion.json ]]; then return; fi
  rm -rf "$out" # what was interrupted
  python invert.py --data natural --count 4 --steps 150 --out "$out" "$@"
}

inversion() { # from what pretrained/ makes of the features, and from noise
  local layer lr
  for layer in vgg16_block{1,2,3,4} alexnet_conv{1,3,5}; do
    lr=0.02
    if [[ $layer == *[345] ]]; then lr=0.005; fi # by validation images
    invert "$layer" --ckpt "pretrained/$layer.pt" --lr "$lr"
  done
  for layer in vgg16_block{1,2,3,4,5} alexnet_conv{1,3,5}; do
    lr=0.03
    if [[ $layer == *1 ]]; then lr=0.1; fi # likewise
    invert "noise_$layer" --encoder "${layer%_*}" --layer "${layer#*_}" --lr "$lr"
  done
}

# shellcheck disable=SC2086  # words
if ((!$#)); then set -- $groups; fi
for group; do
  if [[ " $groups " != *" $group "* ]]; then
    echo "error: $group: is none of $groups" >&2 && exit 2
  fi
done
for group; do "$group"; done
