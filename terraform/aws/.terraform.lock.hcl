# This file is maintained automatically by "terraform init".
# Manual edits may be lost in future updates.

provider "registry.terraform.io/hashicorp/aws" {
  version     = "6.69.1"
  constraints = ">= 6.0.0"
  hashes = [
    "h1:YITAe5/9nw0IIlr6VwZe60RrjYO9ks8y3RD2qHx10q0=",
  ]
}
