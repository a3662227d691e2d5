output "cache_url" {
  description = "Address of the cache, for `substituters`."
  value       = "${local.url}/cache"
}

output "show_public_key" {
  description = "Command that prints the cache's public key, which the coordinator makes on its first start."
  value       = "ssh root@${hcloud_server.coordinator.ipv4_address} 'journalctl -u drover-coordinator | grep \"public key\"'"
}

output "show_api_token" {
  description = "Command that prints the API token, which clients send."
  value       = "ssh root@${hcloud_server.coordinator.ipv4_address} cat /var/lib/drover/secrets/api-token"
}

output "join" {
  description = "Command that joins a further machine in the farm's network; the token is in the file that this farm was made with."
  value       = "install -m 400 ${var.secrets.ray_token_file} ray-token && drover worker --head ${local.head} --host ADDRESS --ray-token ray-token --name NAME --state-dir /var/lib/drover-worker"
}

output "front_address" {
  description = "What the domain's record names, where there is one."
  value       = one(hcloud_load_balancer.front[*].ipv4)
}
