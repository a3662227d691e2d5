# A cheap farm: a coordinator, two workers for x86_64 and one for arm64, objects in a bucket. The token of Hetzner's API is
# taken from HCLOUD_TOKEN. `openssl rand -hex 32 > ray-token`, and a file `bucket` with the bucket's two credentials, first.
variable "source_url" { type = string }
variable "source_sha256" { type = string }
variable "my_address" { type = string }
variable "my_key" { type = string }
variable "bucket" { type = string }

terraform {
  required_providers {
    hcloud = { source = "hetznercloud/hcloud" }
  }
}

provider "hcloud" {}

module "farm" {
  source        = "../../hetzner"
  location      = "fsn1"
  source_url    = var.source_url
  source_sha256 = var.source_sha256
  domain        = "farm.example.org"
  ssh           = { public_key = var.my_key, from = ["${var.my_address}/32"] }
  secrets       = { ray_token_file = "${path.module}/ray-token", bucket_file = "${path.module}/bucket" }
  object_store  = { url = "s3://${var.bucket}/farm", endpoint = "https://fsn1.your-objectstorage.com" }
  workers = {
    x86 = { server_type = "cx53", count = 2, features = ["big-parallel"] }
    arm = { server_type = "cax41" }
  }
}

output "cache_url" { value = module.farm.cache_url }
output "show_public_key" { value = module.farm.show_public_key }
output "show_api_token" { value = module.farm.show_api_token }
output "join" { value = module.farm.join }
output "front_address" { value = module.farm.front_address }
