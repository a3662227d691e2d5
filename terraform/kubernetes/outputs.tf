output "cache_url" {
  description = "Address of the cache, for `substituters`."
  value       = "${local.url}/cache"
}

output "show_public_key" {
  description = "Command that prints the cache's public key."
  value       = "kubectl -n ${var.namespace.name} logs deployment/${var.name}-coordinator | grep 'public key'"
}

output "join" {
  description = "Command that joins a further machine that reaches the cluster's pods; the token is in the Secret."
  value       = "kubectl -n ${var.namespace.name} get secret ${var.secrets.farm} -o jsonpath='{.data.ray-token}' | base64 -d > ray-token && chmod 400 ray-token && drover worker --head $(kubectl -n ${var.namespace.name} get service ${var.name}-head -o jsonpath='{.spec.clusterIP}'):6379 --host ADDRESS --ray-token ray-token --name NAME --state-dir /var/lib/drover-worker"
}

output "values" {
  description = "What the chart is given; no secret is in it."
  value       = helm_release.farm.values
}
