/** One of this many entries is deleted at a time. */
const PARTS = 100

/**
 * Makes room in a map that may have `max` entries, in the order of their age: if it is full, the oldest hundredth is
 * deleted. Not one entry at a time: V8's iterator passes over deleted entries, which took 35 µs with 100,000.
 */
export function makeRoom<Key, Value> (
  map: Map<Key, Value>, max: number, remove = (key: Key, _value: Value): unknown => map.delete(key)
): void {
  if (map.size < max) return
  const rest = map.size - Math.ceil(max / PARTS)
  for (const [key, value] of map) {
    if (map.size <= rest) break
    remove(key, value)
  }
}
