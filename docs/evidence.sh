#!/usr/bin/env bash
# The evidence of docs/findings.md, erratum.md and tables/: trained, evaluated, compared.
#
#   bash docs/evidence.sh                      what is not done yet; on two CPU cores:
#                                         loss, decoders and weights an hour, feedback another, muon and layers half
#                                         of one each, data 45 minutes, deep seven hours, natural four, lite0 one
#                                         and a quarter, published 27 minutes, inversion 20
#   bash docs/evidence.sh loss layers          some of them
#   SEEDS="1 2" bash docs/evidence.sh          other seeds than 1, 2 and 3 (deep, natural, lite0 and published have one,
#                                         42; inversion none)
#   RUNS=folder bash docs/evidence.sh          another folder than runs/evidence
#
# Needs natural/ and wide/ in the folder above; deep, natural and lite0 imagenet/ too: docs/natural.txt, wide.txt and
# imagenet.txt name their photographs. What was interrupted goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seeds=${SEEDS:-1 2 3}
root=${RUNS:-runs/evidence}
if [[ ! $seeds =~ ^[0-9][0-9[:space:]]*$ ]]; then
  echo "error: SEEDS=\"$seeds\": are whole numbers with spaces between them" >&2 && exit 2
fi
groups="loss decoders muon feedback weights layers data deep natural lite0 published inversion"

lowest() { # of the runs in these folders, the name of the one with the lowest validation loss
  python - "$@" << 'END'
import csv, sys
from pathlib import Path
def loss(run):
    return min(float(row["val_loss"]) for row in csv.DictReader(open(Path(run, "history.csv"))))
print(Path(min(sys.argv[1:], key=loss)).name)
END
}

current() { # RESULT CHECKPOINT: whether the result is there, and of this checkpoint, if both are there to tell
  [[ -f $1 ]] || return 1
  if [[ ! -f $2 ]] || ! grep -q ckpt_sha256 "$1"; then return 0; fi
  grep -q "$(sha256sum < "$2" | cut -c -64)" "$1"
}

measured() { # GROUP/NAME: whether it is with every seed
  local seed
  for seed in $seeds; do
    if ! current "$root/$1/seed$seed"/{metrics.json,best.pt}; then return 1; fi
  done
}

# GROUP/NAME "RATES" FLAGS…: trains with each of several rates and the first seed, with the best of them and the other
# seeds, and evaluates.
train() {
  local name=$1 rates=$2 rate seed run first=${seeds%% *}
  local tried=$root/rates/$name/seed$first
  shift 2
  if measured "$name"; then return; fi
  rate=$rates
  if [[ $rates == *" "* ]]; then
    for rate in $rates; do
      python train.py --recipe study "$@" --lr "$rate" --seed "$first" --out "$tried/$rate" --resume
    done
    rate=$(lowest "$tried"/*)
  fi
  for seed in $seeds; do
    run=$root/$name/seed$seed
    if current "$run"/{metrics.json,best.pt}; then continue; fi
    if [[ $seed == "$first" && -d $tried/$rate && ! -d $run ]]; then
      rm -rf "$run.part" # what was interrupted
      mkdir -p "$root/$name"
      cp -r "$tried/$rate" "$run.part"
      mv "$run.part" "$run"
    fi
    python train.py --recipe study "$@" --lr "$rate" --seed "$seed" --out "$run" --resume
    python evaluate.py --ckpt "$run/best.pt" --trust-code
  done
}

compare() { # FOLDER FIRST OTHER…: how the others differ from the first, in FOLDER/compare.csv and .png
  local out=$root/$1 runs=() run
  shift
  for run; do runs+=("$root/$run"); done # not "${@/#/$root/}", where a & in $root is not one
  python evaluate.py --compare "${runs[@]}" --out "$out"
}

mse="--mse-weight 1 --lpips-weight 0"
fast="--config configs/fast.yaml --data natural"
best="--config configs/best.yaml --optimizer adam --epochs 1 --data natural"
by_adam="--config configs/best.yaml --optimizer adam --decoder residual --batch-size 8"

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
  train muon/tconv "1e-3 3e-3 1e-2" $fast $mse --passes 20 --optimizer muon
  train muon/residual "3.5e-4 7e-4 2e-3" $best --decoder residual --passes 6 --optimizer muon
  train muon/feedback 1.4e-3 $best --passes 4 --optimizer muon
  compare muon muon/{tconv,residual,feedback}
  compare muon/tconv loss/mse muon/tconv
  compare muon/residual decoders/residual muon/residual
  compare muon/feedback decoders/feedback muon/feedback
}

feedback() { # by Muon and MSE, a minute and a half each: does looking at the encoder help deeper than block1, too?
  local muon="$best --optimizer muon"
  train feedback/block2/residual "3.5e-4 7e-4 2e-3" $muon --layer block2 --decoder residual --passes 9
  train feedback/block2/feedback "7e-4 1.4e-3 2.8e-3" $muon --layer block2 --passes 3
  train feedback/block3/residual "3.5e-4 7e-4 2e-3" $muon --layer block3 --decoder residual --passes 8
  train feedback/block3/feedback "7e-4 1.4e-3 2.8e-3" $muon --layer block3 --passes 2
  compare feedback/block2 feedback/block2/{residual,feedback}
  compare feedback/block3 feedback/block3/{residual,feedback}
}

weights() { # ImageNet's or random ones
  train loss/hybrid 1e-2 $fast
  train weights/block1 "1e-2 3e-3" $fast --weights random
  compare weights loss/hybrid weights/block1
}

layers() { # AlexNet, MSE, under a minute each: one convolution deep at four resolutions; one to five deep at 13×13
  local rates="7e-4 2e-3" alexnet="$by_adam --crop 160 --kept-crops 4 --epochs 1 --data natural"
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
  local all="$by_adam --encoder torchvision/alexnet --layer features.10 --crop 160 --epochs 3 --data wide"
  all+=" --val-images 160"
  train data/100 "7e-4 2e-3" $all --train-images 80 --kept-crops 64 --passes 77
  train data/400 "7e-4 2e-3" $all --train-images 320 --kept-crops 32 --passes 19
  train data/800 "7e-4 2e-3" $all --train-images 640 --kept-crops 16 --passes 10
  train data/3853 "7e-4 2e-3" $all --kept-crops 4 --passes 2
  compare data data/3853 data/800 data/400 data/100
}

on() { # DATA RUN…: evaluates the runs on the test images of DATA, too
  local data=$1 run
  shift
  for run; do
    if current "$root/$run/"{"$data/metrics.json",seed42/best.pt}; then continue; fi
    rm -rf "${root:?}/$run/$data" # what was interrupted, or is of an earlier best.pt
    python evaluate.py --ckpt "$root/$run/seed42/best.pt" --data "$data" --out "$root/$run/$data"
  done
}

versus() { # NAME FIRST OTHER, runs of wide: how the other differs, on natural's test images and on imagenet
  on imagenet "$2" "$3"
  compare "$1/natural" "$2" "$3"
  compare "$1/imagenet" "$2/imagenet" "$3/imagenet"
}

both() { # NAME "ADAM'S RATES" MUON'S-RATE FLAGS…
  local name=$1 adam=$2 muon=$3
  shift 3
  train "deep/adam/$name" "$adam" "$@" --optimizer adam
  train "deep/muon/$name" "$muon" "$@"
  versus "deep/$name" deep/{adam,muon}/"$name"
}

deep() { # by Adam and by Muon, and what is better there: MSE, wide's photographs, one seed; pretrained/ is of these
  local seeds=42 feedback="--config configs/best.yaml --data wide --val-images 160"
  local residual="$feedback --decoder residual --batch-size 8 --passes 2 --epochs 8"
  local kept="$residual --crop 192 --kept-crops 4"
  both vgg16_block2 "7e-4 1.4e-3" 1.4e-3 $feedback --layer block2 --passes 2 --epochs 2
  both vgg16_block3 7e-4 1.4e-3 $feedback --layer block3 --passes 1 --epochs 4 --width 128
  both vgg16_block4 7e-4 2e-3 $residual --layer block4 --crop 160 --kept-crops 2
  both alexnet_conv1 "7e-4 1.4e-3" 1.4e-3 $feedback --encoder alexnet --layer conv1 --crop 160 --passes 1 --epochs 4
  both alexnet_conv3 "7e-4 1.4e-3" 1.4e-3 $feedback --encoder alexnet --layer conv3 --crop 160 --passes 1 --epochs 2
  both alexnet_features.10 2e-3 2e-3 $kept --encoder torchvision/alexnet --layer features.10
  both alexnet_conv5 2e-3 2e-3 $kept --encoder alexnet --layer conv5
  train deep/muon/vgg16_block2_residual 7e-4 $feedback --decoder residual --layer block2 --passes 6 --epochs 2
  train deep/muon/vgg16_block3_residual 2e-3 $residual --layer block3 --crop 96
  train deep/muon/alexnet_conv1_residual 2e-3 $residual --encoder alexnet --layer conv1 --crop 160 --epochs 6
  train deep/muon/alexnet_conv3_residual 2e-3 $residual --encoder alexnet --layer conv3 --crop 160
  train deep/muon/vgg16_block4_crops 2e-3 $residual --layer block4 --crop 160 --kept-crops 4
  train deep/muon/vgg16_block5 2e-3 $kept --layer block5
  train deep/muon/alexnet_conv2 2e-3 $kept --encoder alexnet --layer conv2
  train deep/muon/alexnet_conv4 2e-3 $kept --encoder alexnet --layer conv4
  train deep/muon/vgg16_block5_128 2e-3 $feedback --decoder residual --layer block5 --crop 192 --kept-crops 4 \
    --width 128 --batch-size 16 --passes 2 --epochs 5
  on imagenet deep/muon/{vgg16_block5,alexnet_conv2,alexnet_conv4}
  versus deep/vgg16_block5_128 deep/muon/vgg16_block5{,_128}
  versus deep/vgg16_block2_residual deep/muon/vgg16_block2{,_residual}
  versus deep/vgg16_block3_residual deep/muon/vgg16_block3{,_residual}
  versus deep/alexnet_conv1_residual deep/muon/alexnet_conv1{,_residual}
  versus deep/alexnet_conv3_residual deep/muon/alexnet_conv3{,_residual}
  versus deep/vgg16_block4_crops deep/muon/vgg16_block4{,_crops}
}

natural() { # by Muon, on natural's 640 photographs as many steps and crops as deep, which it wants, has on wide's 3,082
  local seeds=42 name data all="--config configs/best.yaml --data natural"
  local residual="$all --decoder residual --batch-size 8 --passes 10 --epochs 8"
  local alexnet="$residual --encoder alexnet --crop 192"
  train natural/vgg16_block3_residual 2e-3 $residual --layer block3 --crop 96
  train natural/vgg16_block4_crops 2e-3 $residual --layer block4 --crop 160 --kept-crops 20
  train natural/vgg16_block5 2e-3 $residual --layer block5 --crop 192 --kept-crops 20
  train natural/alexnet_conv1 1.4e-3 $all --encoder alexnet --layer conv1 --crop 160 --passes 5 --epochs 4
  train natural/alexnet_conv2 2e-3 $alexnet --layer conv2 --kept-crops 20
  train natural/alexnet_conv3_residual 2e-3 $residual --encoder alexnet --layer conv3 --crop 160
  train natural/alexnet_conv4 2e-3 $alexnet --layer conv4 --kept-crops 20
  train natural/alexnet_conv5 2e-3 $alexnet --layer conv5 --kept-crops 20
  # and with as many of each photograph as on wide, a fifth
  train natural/fewer/vgg16_block4_crops 2e-3 $residual --layer block4 --crop 160 --kept-crops 4
  train natural/fewer/vgg16_block5 2e-3 $residual --layer block5 --crop 192 --kept-crops 4
  train natural/fewer/alexnet_conv4 2e-3 $alexnet --layer conv4 --kept-crops 4
  train natural/fewer/alexnet_conv5 2e-3 $alexnet --layer conv5 --kept-crops 4
  for data in natural imagenet; do
    for name in vgg16_block{3_residual,4_crops,5} alexnet_conv{1,2,3_residual,4,5}; do
      on $data {deep/muon,natural}/$name
      compare natural/$name/$data/compare {deep/muon,natural}/$name/$data
    done
    for name in vgg16_block{4_crops,5} alexnet_conv{4,5}; do
      on $data natural/fewer/$name
      compare natural/fewer/$name/$data/compare {natural/fewer,natural,deep/muon}/$name/$data
    done
  done
}

lite0() { # in place of VGG16's block2 to block5, as deep, which it wants, trains those: as many positions
  local seeds=42 weights=$root/lite0.safetensors
  local lite=(--encoder timm/tf_efficientnet_lite0 --weights "$weights")
  lite+=(--config configs/best.yaml --data wide --val-images 160)
  local residual=("${lite[@]}" --decoder residual --batch-size 8 --passes 2 --epochs 8)
  if [[ ! -f $weights ]]; then
    mkdir -p "$root"
    python docs/lite0.py "$weights"
  fi
  train lite0/blocks.1 1.4e-3 "${lite[@]}" --layer blocks.1 --passes 2 --epochs 2
  train lite0/blocks.2 2e-3 "${residual[@]}" --layer blocks.2 --crop 96
  train lite0/blocks.4 2e-3 "${residual[@]}" --layer blocks.4 --crop 160 --kept-crops 4
  train lite0/blocks.6 2e-3 "${residual[@]}" --layer blocks.6 --crop 192 --kept-crops 4
  versus lite0/vgg16_block2 deep/muon/vgg16_block2 lite0/blocks.1
  versus lite0/vgg16_block3 deep/muon/vgg16_block3_residual lite0/blocks.2
  versus lite0/vgg16_block4 deep/muon/vgg16_block4_crops lite0/blocks.4
  versus lite0/vgg16_block5 deep/muon/vgg16_block5 lite0/blocks.6
}

published() { # the study's own recipe, by our reading of its code, one seed
  seeds=42 train published 1e-4 --protocol published --data natural
}

invert() { # NAME FLAGS…: pixels whose features are those of four test images, if that is not done
  local out=$root/inversion/$1 ckpt=pretrained/$1.pt # none of that name is there for noise
  shift
  if current "$out/inversion.json" "$ckpt"; then return; fi
  rm -rf "$out" # what was interrupted
  python invert.py --data natural --count 4 --steps 150 --out "$out" "$@"
}

inversion() { # from what pretrained/ makes of the features, and from noise
  local layer start noise
  for layer in vgg16_block{1,2,3,4,5} alexnet_conv{1,3,5}; do
    start="" noise="" # the default rates, which validation images chose (docs/tables/inversion_rates.csv)
    if [[ $layer == vgg16_block1 ]]; then start="--lr 0.002 --tv-weight 0.01"; fi
    if [[ $layer == alexnet_conv1 ]]; then start="--lr 0.02" noise="--lr 0.1"; fi
    invert "$layer" --ckpt "pretrained/$layer.pt" $start
    invert "noise_$layer" --encoder "${layer%_*}" --layer "${layer#*_}" $noise
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
