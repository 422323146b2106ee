/** Returns the value below which that share of a list lies; between two values it interpolates. */
export function quantile (list, share) {
  const sorted = list.toSorted((a, b) => a - b)
  const at = (sorted.length - 1) * share
  const [low, high] = [sorted[Math.floor(at)], sorted[Math.ceil(at)]]
  return low + (high - low) * (at - Math.floor(at))
}

export const median = list => quantile(list, 0.5)

/** Returns the mean of a list and twice its standard error. */
export function meanOf (list) {
  const mean = list.reduce((sum, value) => sum + value, 0) / list.length
  const deviation = Math.sqrt(list.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (list.length - 1))
  return { mean, error: 2 * deviation / Math.sqrt(list.length) }
}
